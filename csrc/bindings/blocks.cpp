// Which block of a pool holds which tokens of which sequence: bookkeeping on the host, in Python as opsdl._blocks.
//
// A fork is a node that points at its parent and at how many of the parent's tokens it shares, so it costs the same whatever
// the length. Sequences only grow, so what is shared never changes; a node that goes on from the middle of a block has that
// one block copied at its first append. Nodes are counted: a freed sequence, with all of its blocks, lives on while a fork
// shares its tokens. The same in Python, for where this is not compiled: opsdl/prefix/memory/blocks.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

struct OutOfBlocksError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct FreedSequenceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Node {
  int64_t parent, shared, length;
  int64_t holders = 1;  // the sequence itself and its forks
  bool freed = false;
  std::vector<int64_t> own;  // blocks from the one that token `shared` is in
};

class BlockLedger {
 public:
  BlockLedger(int64_t blocks, int64_t block_size) : blocks_(blocks), size_(block_size) {
    if (blocks < 1 || block_size < 1) throw std::invalid_argument("BlockLedger: expected blocks and block_size above 0");
    for (int64_t block = blocks - 1; block >= 0; --block) free_.push_back(block);  // the first one is taken first
  }

  int64_t create() { return add({-1, 0, 0}); }

  int64_t fork(int64_t sequence) {
    Node& parent = get(sequence);
    ++parent.holders;
    return add({sequence, parent.length, parent.length});
  }

  // Room for `count` more tokens in each sequence, or in none: their slots, and the blocks to copy first, from and to.
  std::pair<std::vector<int64_t>, std::vector<std::pair<int64_t, int64_t>>> append(const std::vector<int64_t>& sequences,
                                                                                   int64_t count) {
    if (count < 0) throw std::invalid_argument("append: expected a count of 0 or more");
    int64_t needed = 0;
    for (size_t i = 0; i < sequences.size(); ++i) {
      for (size_t j = 0; j < i; ++j) {
        if (sequences[i] == sequences[j]) throw std::invalid_argument("append: a sequence is named twice");
      }
      needed += blocks_needed(get(sequences[i]), count);
    }
    if (needed > static_cast<int64_t>(free_.size())) {
      throw OutOfBlocksError("out of blocks: " + std::to_string(needed) + " blocks of " + std::to_string(size_) +
                             " tokens are needed, " + std::to_string(free_.size()) + " of " + std::to_string(blocks_) +
                             " are free; free sequences, or give the pool more bytes");
    }
    std::vector<int64_t> slots;
    std::vector<std::pair<int64_t, int64_t>> copies;
    for (const int64_t sequence : sequences) {
      Node& node = get(sequence);
      const int64_t first = node.shared / size_;
      if (count > 0 && node.own.empty() && node.shared % size_ != 0) {
        const int64_t source = table(node).back();
        copies.emplace_back(source, take(node));
      }
      for (int64_t more = blocks_needed(node, count); more > 0; --more) take(node);
      for (int64_t token = node.length; token < node.length + count; ++token) {
        slots.push_back(node.own[token / size_ - first] * size_ + token % size_);
      }
      node.length += count;
    }
    return {slots, copies};
  }

  // The blocks that hold a sequence's tokens, in their order.
  std::vector<int64_t> blocks(int64_t sequence) { return table(get(sequence)); }

  int64_t length(int64_t sequence) { return get(sequence).length; }

  void free(int64_t sequence) {
    get(sequence).freed = true;
    while (sequence >= 0) {
      Node& node = nodes_.at(sequence);
      if (--node.holders > 0) return;
      free_.insert(free_.end(), node.own.rbegin(), node.own.rend());
      const int64_t parent = node.parent;
      nodes_.erase(sequence);
      sequence = parent;
    }
  }

  int64_t free_blocks() const { return free_.size(); }

 private:
  int64_t add(Node node) {
    nodes_.emplace(next_, std::move(node));
    return next_++;  // never used again, so that a stale one is noticed
  }

  Node& get(int64_t sequence) {
    const auto found = nodes_.find(sequence);
    if (found == nodes_.end() || found->second.freed) throw FreedSequenceError("the sequence was freed before");
    return found->second;
  }

  int64_t blocks_needed(const Node& node, int64_t count) const {
    if (count == 0) return 0;
    return (node.length + count + size_ - 1) / size_ - node.shared / size_ - static_cast<int64_t>(node.own.size());
  }

  int64_t take(Node& node) {
    node.own.push_back(free_.back());
    free_.pop_back();
    return node.own.back();
  }

  std::vector<int64_t> table(const Node& of) const {
    std::vector<int64_t> out((of.length + size_ - 1) / size_);
    int64_t end = out.size();
    const Node* node = &of;
    while (end > 0) {
      const int64_t first = node->shared / size_;
      if (!node->own.empty()) {
        for (int64_t i = first; i < end; ++i) out[i] = node->own[i - first];
        end = std::min(end, first);
      }
      if (end > 0) node = &nodes_.at(node->parent);
    }
    return out;
  }

  int64_t blocks_, size_, next_ = 0;
  std::vector<int64_t> free_;
  std::unordered_map<int64_t, Node> nodes_;
};

}  // namespace

PYBIND11_MODULE(_blocks, m) {
  namespace py = pybind11;
  py::register_exception<OutOfBlocksError>(m, "OutOfBlocksError", PyExc_MemoryError);
  py::register_exception<FreedSequenceError>(m, "FreedSequenceError", PyExc_RuntimeError);
  py::class_<BlockLedger>(m, "BlockLedger")
      .def(py::init<int64_t, int64_t>(), py::arg("blocks"), py::arg("block_size"))
      .def("create", &BlockLedger::create)
      .def("fork", &BlockLedger::fork)
      .def("append", &BlockLedger::append)
      .def("blocks", &BlockLedger::blocks)
      .def("length", &BlockLedger::length)
      .def("free", &BlockLedger::free)
      .def_property_readonly("free_blocks", &BlockLedger::free_blocks);
}
