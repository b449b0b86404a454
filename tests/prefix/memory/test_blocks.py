"""The bookkeeping of blocks, compiled and in Python, against a model that copies everything."""

import random

import pytest

from opsdl.prefix.memory import blocks

LEDGERS = [blocks.PythonLedger] + ([] if blocks.BlockLedger is blocks.PythonLedger else [blocks.BlockLedger])
ledgers = pytest.mark.parametrize("kind", LEDGERS, ids=lambda kind: kind.__module__)


class Copying:
    """Every sequence has its own list of tokens; memory is what the ledger says, written as a user would."""

    def __init__(self, kind, count, size):
        self.ledger, self.size, self.memory, self.tokens = kind(count, size), size, {}, {}

    def append(self, sequences, count):
        slots, copies = self.ledger.append(sequences, count)
        for source, target in copies:
            for place in range(self.size):
                self.memory[target * self.size + place] = self.memory.get(source * self.size + place)
        new = [random.random() for _ in slots]
        self.memory.update(zip(slots, new, strict=True))
        for index, sequence in enumerate(sequences):
            self.tokens[sequence] += new[index * count : (index + 1) * count]

    def read(self, sequence):
        table = self.ledger.blocks(sequence)
        length = self.ledger.length(sequence)
        return [self.memory[table[i // self.size] * self.size + i % self.size] for i in range(length)]


@ledgers
@pytest.mark.parametrize("size", [1, 4, 16])
def test_ten_thousand_random_operations(kind, size):
    random.seed(size)
    count = 200
    model, full = Copying(kind, count, size), 0
    for _ in range(10_000):
        held = list(model.tokens)
        action = random.random()
        if not held or action < 0.05:
            model.tokens[model.ledger.create()] = []
        elif action < 0.3:
            parent = random.choice(held)
            model.tokens[model.ledger.fork(parent)] = list(model.tokens[parent])
        elif action < 0.55:
            sequence = random.choice(held)
            model.ledger.free(sequence)
            del model.tokens[sequence]
        else:
            chosen = random.sample(held, min(len(held), random.randint(1, 3)))
            before = model.ledger.free_blocks
            try:
                model.append(chosen, random.randint(0, 3 * size))
            except blocks.OutOfBlocksError:
                full += 1
                assert model.ledger.free_blocks == before
        for sequence in random.sample(list(model.tokens), min(2, len(model.tokens))):
            assert model.read(sequence) == model.tokens[sequence]
    assert full > 10
    for sequence in model.tokens:
        model.ledger.free(sequence)
    assert model.ledger.free_blocks == count


def test_both_give_the_same_answers():
    if len(LEDGERS) == 1:
        pytest.skip("opsdl._blocks is not built")
    random.seed(0)
    pair, held = [kind(60, 4) for kind in LEDGERS], []
    for _ in range(3000):
        action = random.choice(["create", "fork", "append", "free", "blocks"])
        arguments = () if action == "create" else (random.choice(held),) if held else None
        if arguments is None:
            continue
        if action == "append":
            arguments = ([arguments[0]], random.randint(0, 9))
        answers = []
        for ledger in pair:
            try:
                answers.append(getattr(ledger, action)(*arguments))
            except (MemoryError, RuntimeError) as error:
                answers.append(str(error))
        assert answers[0] == answers[1] or list(answers[0]) == list(answers[1])
        held += [answers[0]] * (action in ("create", "fork") and isinstance(answers[0], int))


@ledgers
def test_a_fork_costs_the_same_for_any_length_and_shares_every_block(kind):
    ledger = kind(1001, 16)
    prefix = ledger.create()
    ledger.append([prefix], 16_000)
    forks = [ledger.fork(prefix) for _ in range(1000)]
    assert ledger.free_blocks == 1
    assert all(ledger.blocks(fork) == ledger.blocks(prefix) for fork in forks[::100])
    ledger.append(forks[:1], 1)
    with pytest.raises(MemoryError, match="out of blocks: 1 blocks of 16 tokens are needed, 0 of 1001 are free"):
        ledger.append(forks[1:2], 1)


@ledgers
def test_copy_on_write_happens_once_and_late(kind):
    ledger = kind(10, 4)
    prefix = ledger.create()
    ledger.append([prefix], 6)
    first, second = ledger.fork(prefix), ledger.fork(prefix)
    assert ledger.free_blocks == 8
    (slots, copies), own = ledger.append([first, second], 1), ledger.blocks(prefix)[1]
    assert [source for source, _ in copies] == [own, own] and ledger.free_blocks == 6
    assert [slot % 4 for slot in slots] == [2, 2] and len({slot // 4 for slot in slots}) == 2
    assert ledger.append([first], 1) == ([slots[0] + 1], [])
    assert ledger.append([prefix], 1)[1] == []  # its own block; the forks see 6 tokens of it


@ledgers
def test_faults(kind):
    ledger = kind(4, 4)
    prefix = ledger.create()
    ledger.append([prefix], 5)
    fork = ledger.fork(prefix)
    ledger.free(prefix)
    for use in (ledger.free, ledger.fork, ledger.blocks, ledger.length, lambda x: ledger.append([x], 1)):
        for sequence in (prefix, 77, -1):
            with pytest.raises(RuntimeError, match="freed before"):
                use(sequence)
    assert ledger.free_blocks == 2  # the fork holds on to both
    with pytest.raises(ValueError, match="twice"):
        ledger.append([fork, fork], 1)
    with pytest.raises(ValueError, match="count"):
        ledger.append([fork], -1)
    with pytest.raises(ValueError, match="above 0"):
        kind(0, 4)
    ledger.free(fork)
    assert ledger.free_blocks == 4
