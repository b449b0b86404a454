"""Every bench runs from its command line to its files, at a tiny size."""

from importlib import import_module

import pytest
import torch

from bench import report
from bench.results import RESULTS, load
from opsdl.config import to_yaml
from tests.support.training import tiny_config


@pytest.fixture
def threads():
    """Benches set torch's threads for their process, which here is that of the tests."""
    before = torch.get_num_threads()
    yield str(before)
    torch.set_num_threads(before)


@pytest.fixture
def arguments(name, request, tmp_path):
    """What a bench needs besides its options: most need nothing."""
    if name != "loss_dtype":
        return []
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(tiny_config(request.getfixturevalue("tiny_model_dir"), tmp_path)))
    return [str(recipe)]


@pytest.mark.filterwarnings("ignore:opsdl. loss backend")
@pytest.mark.parametrize("name", report.REPORTS)
def test_quick(name, arguments, threads, tmp_path):
    import_module(f"bench.{name}").main([*arguments, "--quick", "--threads", threads, "--out", str(tmp_path)])
    result = load(tmp_path / f"{name}.json")
    assert result.cases and not any(case.missing for case in result.cases)
    assert (tmp_path / f"{name}.md").read_text() == report.REPORTS[name](result).markdown
    assert not list(tmp_path.glob("*.part.json"))


def test_a_quick_run_never_replaces_the_committed_results(capsys):
    with pytest.raises(SystemExit):
        import_module("bench.attention").main(["--quick", "--out", str(RESULTS)])
    assert "give --out DIR too" in capsys.readouterr().err
