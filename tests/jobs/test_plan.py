"""The plan at the command line: marked figures, prices, and refusals in one paragraph with status 2."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import plan
from jobs.shared.cli import run
from tests.jobs.command_line import flag

SMALL = [
    *("--model.backbone", "small", "--model.hidden-dim", "32", "--model.feedforward-dim", "64"),
    *("--model.encoder-layers", "0", "--model.decoder-layers", "2"),
]
Answer = tuple[int | None, str, str]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Return a function that runs the job and returns its status and both streams."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MASKFORMER_TRAIN_DATA", raising=False)

    def job(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        with pytest.raises(SystemExit) as end:
            run(plan.main)
        streams = capsys.readouterr()
        code = end.value.code
        assert code is None or isinstance(code, int)
        return code, streams.out, streams.err

    return job


def test_every_figure_says_what_it_rests_on(planned: Callable[..., Answer]) -> None:
    status, out, _ = planned("--recipe", "swin_l_mmdet", *SMALL)
    assert status in (None, 0)
    figures = [line for line in out.splitlines() if not line.startswith("warning: ")]
    assert all(line[18:29].strip() in ("measured", "modeled", "published", "given") for line in figures)
    assert "64 = 64 workers x 1 images x 1 accumulated" in out
    assert "8 node(s), 64 GPUs, 768 CPUs" in out
    assert re.search(r"^steps +published +554,471 = 35,486,144 images$", out, re.MULTILINE)
    assert re.search(r"GPU hours x price per GPU hour \(--price\)$", out, re.MULTILINE)


def test_the_price_is_hours_times_gpus_times_price(planned: Callable[..., Answer]) -> None:
    _, out, _ = planned("--price", "2.5", "--scaling.workers", "4", *SMALL, *flag("cluster.tflops", (0.01, 0.01)))
    assert "16 = 4 workers x 1 images x 4 accumulated" in out
    (worst, gpu_hours) = re.findall(r"^price .* to ([\d,]+) = [\d,]+ to ([\d,]+) GPU hours x 2\.5$", out, re.MULTILINE)[
        0
    ]
    (hours,) = re.findall(r"^hours +modeled +[\d.,]+ to ([\d.,]+) ", out, re.MULTILINE)
    assert float(gpu_hours.replace(",", "")) == pytest.approx(8 * float(hours.replace(",", "")), abs=1)
    assert float(worst.replace(",", "")) == pytest.approx(2.5 * 8 * float(hours.replace(",", "")), abs=2)
    assert "warning: 4 of 8 GPUs are paid for and idle." in out


@pytest.mark.slow
def test_a_recipe_for_cpus_in_a_file(planned: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"recipe": "demo", "run": {"steps": 1234}}))
    node = ("--cluster.gpus-per-node", "0", "--cluster.cpus-per-node", "2")
    status, out, _ = planned("--config", str(tmp_path / "plan.json"), *node)
    assert status in (None, 0)
    assert "1 node(s), 0 GPUs, 2 CPUs" in out
    assert re.search(r"^steps +given +1,234 = 9,872 images$", out, re.MULTILINE)
    assert re.search(r"^images +\w+ +1,600 that the demo draws$", out, re.MULTILINE)
    assert "price" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--cluster.nodes", "1"],
            r"needs 96 CPU, 16 GPU: 16 workers .* The cluster has 96 CPU, 8 GPU, with room for 8 workers",
        ),
        (["--recipe", "r50"], r"There is no recipe 'r50' .* r50_mmdet, swin_l_mmdet, .*demo"),
        (["--live"], r"RAY_ADDRESS names none\. Set it, or describe one by --cluster"),
        ([*SMALL, "--cluster.gpu-memory", "0.1"], r"needs \d+\.\d GB with 25 segments .* but a GPU has 0\.1 GB\. "),
    ],
)
def test_refusals(planned: Callable[..., Answer], arguments: list[str], message: str) -> None:
    status, out, err = planned(*arguments)
    assert (status, out) == (2, "")
    (paragraph,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(message, paragraph)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--price", "-1"],
        ["--images-per-cpu-second", "0"],
        ["--masks", "3", "2", "1"],
        ["--cluster.tflops", "3", "1"],
    ],
    ids=lambda a: a[0],
)
def test_numbers_that_make_no_sense(planned: Callable[..., Answer], arguments: list[str]) -> None:
    status, out, err = planned(*arguments)
    assert (status, out) == (2, "")
    assert arguments[0].removeprefix("--") in err
    assert "Traceback" not in err
