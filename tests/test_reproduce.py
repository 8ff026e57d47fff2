"""Every command of docs/reproduce.md that trains, tests or compares runs as it stands, on tiny data with two steps."""

from pathlib import Path

import pytest

from tests.conftest import ROOT, SMALL, data_flags, run_in_process
from tests.datasets.test_isic import write_raw as write_isic
from tests.datasets.test_segpc import write_raw as write_segpc
from tests.datasets.test_synapse import write_raw as write_synapse
from tests.narrow import narrow_pico  # noqa: F401, a fixture for the whole module
from tests.test_docs import commands

BUDGET = [*SMALL, *"--img_size 32 --img_size_dmwla 32 --max_iterations 2 --warmup_iterations 1 --batch_size 2".split()]


@pytest.fixture(scope="module")
def data(tmp_path_factory, phantom) -> dict[str, list[str]]:
    """Return for each data set the flags that say where its tiny files are."""
    folder = tmp_path_factory.mktemp("data")
    write_synapse(folder / "synapse_raw", cases=(1, 5, 7))
    write_segpc(folder / "segpc_raw/train", ("3", "5", "8", "9", "10"))
    write_segpc(folder / "segpc_raw/valid", ("20", "21"))
    write_isic(folder / "isic_raw", [f"ISIC_{number:07d}" for number in range(10)])
    for name in ("synapse", "segpc", "isic"):
        flags = ["--raw", folder / f"{name}_raw", "--out", folder / name, "--jobs", 1]
        assert run_in_process("prepare_data.py", name, *flags).status == 0
    lists = folder / "synapse/lists"
    lists.mkdir(exist_ok=True)
    (lists / "train.txt").write_text("case0005\ncase0007\n")
    (lists / "test_vol.txt").write_text("case0001\n")
    images = {n: ["--root_path", f"{folder / n}", "--list_dir", f"{folder / n}/lists"] for n in ("segpc", "isic")}
    return {"acdc": data_flags(phantom), "synapse": data_flags(folder / "synapse")} | images


def test_every_row_trains_and_tests_with_a_budget_of_two_steps(data, tmp_path, monkeypatch):
    rows = list(commands((ROOT / "docs/reproduce.md").read_text(encoding="utf-8")))
    rows = [(script.name, flags) for script, flags in rows if script.parent == ROOT]
    assert len(rows) == 21  # ten rows, each trained and tested, and the table
    for script, flags in rows:
        kind, _, dataset = Path(script).stem.partition("_")
        flags = [flag.replace("runs/", f"{tmp_path}/") for flag in flags]
        if kind == "train":
            run = tmp_path / "reproduce" / Path(flags[flags.index("--output_dir") + 1]).name
            flags += [*data[dataset], *BUDGET, "--select_from_epoch", "1"]
            flags += ["--val_cases", "case0007"] if dataset == "synapse" else []
        elif kind == "test":
            flags += data[dataset][0 if dataset in ("segpc", "isic") else 2 :]
        else:
            flags = [*map(str, sorted((tmp_path / "reproduce").iterdir())), *flags[1:]]
        done = run_in_process(script, *flags)
        assert done.status == 0, f"{script} {flags}: {done.error}"
        if kind == "test":
            assert list(run.glob("results_*/summary.json")), run
    assert (tmp_path / "reproduce_tables").is_dir()
