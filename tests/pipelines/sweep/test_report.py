"""Reports of a sweep, against definitions computed by hand or by SciPy."""

import csv
import io
import math
import re
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from pipelines import columns
from pipelines.sweep import report
from pipelines.sweep.report import TrialRecord


def trial(name: str, status: str, results: list[tuple[int, float]], cause: str = "", **values: Any) -> TrialRecord:
    return TrialRecord(name, {k.replace("__", "."): v for k, v in values.items()}, status, results, cause)


def one_step(pqs: list[float], **columns: list[Any]) -> list[TrialRecord]:
    """Return finished trials with these PQs and a column of values for each setting."""
    return [
        trial(f"t{row}", "finished", [(10, pq)], **{setting: column[row] for setting, column in columns.items()})
        for row, pq in enumerate(pqs)
    ]


def spearman(values: Any, pqs: Any) -> float:
    result: Any = spearmanr(values, pqs)
    return float(result.statistic)


def test_ranking() -> None:
    expected = [
        trial("e", "finished", [(10, 0.5), (40, 0.30)]),
        trial("a", "finished", [(10, 0.1), (40, 0.25)]),
        trial("c", "finished", [(10, 0.1), (40, 0.25)]),  # a tie, by name
        trial("h", "stopped early", [(10, 0.4), (20, 0.45)]),  # better, but not at the end
        trial("b", "running", [(20, 0.2)]),
        trial("d", "stopped early", [(10, 0.44)]),
        trial("f", "failed", [(30, 0.6)], "it diverged"),
        trial("g", "finished", [(40, math.nan)]),
        trial("i", "waiting", []),
    ]
    for order in range(5):
        shuffled = list(np.random.default_rng(order).permutation(len(expected)))
        assert report.ranking([expected[index] for index in shuffled]) == expected


def test_finished_trials_of_different_lengths_are_ranked_by_pq() -> None:
    short, long = trial("short", "finished", [(10, 0.3)]), trial("long", "finished", [(90, 0.2)])
    assert report.ranking([long, short]) == [short, long]


def test_trials_that_learned_nothing_are_tied() -> None:
    assert report.tied(one_step([0.0, 0.0, 0.0]))
    assert not report.tied(one_step([0.0, 0.0, 0.1]))
    assert not report.tied([*one_step([0.0]), trial("failed", "failed", [])])  # one alone


def test_numbers_are_scored_by_rank_correlation() -> None:
    pqs = [0.3, 0.1, 0.4, 0.15, 0.9, 0.26]
    columns = {
        "same__order": [3.0, 1.0, 5.0, 2.0, 9.0, 2.5],
        "reverse": [-(pq**3) for pq in pqs],
        "with__ties": [1, 2, 2, 1, 2, 3],
        "half__none": [1.0, 0.5, 0.1, 0.5, 0.2, 0.9],
    }
    found = {setting: (score, sign) for setting, score, sign in report.importance(one_step(pqs, **columns))}
    for setting, column in columns.items():
        rho = spearman(column, pqs)
        assert found[setting.replace("__", ".")] == (pytest.approx(abs(rho)), "+" if rho > 0 else "-")
    assert found["same.order"] == (pytest.approx(1), "+")
    assert found["reverse"] == (pytest.approx(1), "-")


def test_names_are_scored_by_the_variance_of_ranks_between_them() -> None:
    # Ranks 1 2 4 | 3 5 6: means 7/3 and 14/3 around 3.5, in all 17.5 = 35/2.
    by_hand = math.sqrt((3 * (7 / 3 - 3.5) ** 2 + 3 * (14 / 3 - 3.5) ** 2) / 17.5)
    pqs, kinds = [0.1, 0.2, 0.4, 0.3, 0.5, 0.6], ["x", "x", "x", "y", "y", "y"]
    columns = {
        "kind": kinds,
        "flag": [kind == "x" for kind in kinds],
        "limit": [None if kind == "x" else 3 for kind in kinds],
    }
    scores = report.importance(one_step(pqs, **columns))
    assert [(setting, sign) for setting, _, sign in scores] == [("flag", None), ("kind", None), ("limit", None)]
    assert [score for _, score, _ in scores] == pytest.approx([by_hand] * 3)
    assert by_hand == pytest.approx(abs(spearman(columns["flag"], pqs)))


def test_trials_are_compared_at_the_last_common_step() -> None:
    records = [
        trial("a", "finished", [(10, 0.1), (20, 0.9), (40, 0.9)], lr=1.0),
        trial("b", "stopped early", [(10, 0.2), (20, 0.5), (40, 0.5)], lr=2.0),
        trial("c", "failed", [(10, 0.3), (20, 0.1), (40, math.nan)], lr=3.0),
        trial("d", "failed", [], lr=4.0),
    ]
    assert report.importance(records) == [("lr", pytest.approx(1), "-")]
    assert "3 trials at step 20" in report.importance_text(records)
    records.append(trial("e", "stopped early", [(10, 0.4)], lr=4.0))
    assert report.importance(records) == [("lr", pytest.approx(1), "+")]
    assert "4 trials at step 10" in report.importance_text(records)


@pytest.mark.filterwarnings("error")
def test_an_undefined_importance_is_nan() -> None:
    names = ["x", "y", "z", "w"]
    scores = report.importance(one_step([0.1, 0.2, 0.3, 0.4], lr=[1.0, 2.0, 4.0, 3.0], same=[1] * 4, names=names))
    assert [setting for setting, _, _ in scores] == ["lr", "names", "same"]
    assert [math.isnan(score) for _, score, _ in scores] == [False, True, True]
    assert math.isnan(report.importance(one_step([0.1] * 3, lr=[1.0, 2.0, 3.0]))[0][1])
    assert math.isnan(report.importance(one_step([0.1, 0.2], lr=[1.0, 2.0]))[0][1])
    apart = [trial("a", "failed", [(10, 0.1)], lr=1.0), trial("b", "failed", [(20, 0.1)], lr=2.0)]
    assert report.importance(apart) == []
    for few in ([], apart, one_step([0.1, 0.2], lr=[1.0, 2.0])):
        assert "Importance of settings: unknown" in report.importance_text(few)


def test_the_text_has_the_score_that_chance_gives() -> None:
    rng = np.random.default_rng(0)
    text = report.importance_text(one_step(list(rng.random(8)), lr=list(rng.random(8)), loss__weight=[1] * 8))
    assert re.search(r"^  lr +0\.\d\d  (higher|lower) is better$", text, re.MULTILINE)
    assert re.search(r"^  loss\.weight  too few values$", text, re.MULTILINE)
    (chance,) = re.findall(r"Only a hint: with 8 trials, a number without any effect reaches (0\.\d\d) ", text)
    reached = [abs(spearman(rng.random(8), rng.random(8))) for _ in range(1000)]
    assert np.mean(np.array(reached) >= float(chance)) == pytest.approx(0.05, abs=0.025)


RECORDS = [
    trial("trial-001", "stopped early", [(250, 0.1)], optimizer__lr=1.23456e-5, data__kind="x,y", loss__kind=None),
    trial("trial-000", "finished", [(250, 0.2), (1500, 0.31234)], optimizer__lr=0.5, data__kind="z", loss__kind=True),
    trial("trial-002", "failed", [], "OSError: no\nspace", optimizer__lr=1.0, data__kind="z", loss__kind=False),
]


def test_the_table_shows_the_best_first() -> None:
    lines = report.table(RECORDS).splitlines()
    assert [re.split(r"  +", line.strip()) for line in lines] == [
        ["trial", "status", "step", "PQ", "lr", "data.kind", "loss.kind"],
        ["trial-000", "finished", "1,500", "31.2", "0.5", "z", "true"],
        ["trial-001", "stopped early", "250", "10.0", "1.235e-05", "x,y", "none"],
        ["trial-002", "failed", "-", "-", "1", "z", "false"],
        ["trial-002: OSError: no space"],
    ]
    assert len(set(map(len, lines[:4]))) == 1


def test_csv_keeps_all_digits() -> None:
    rows = list(csv.DictReader(io.StringIO(report.csv(RECORDS))))
    assert [row["trial"] for row in rows] == ["trial-000", "trial-001", "trial-002"]
    assert [float(row["optimizer.lr"]) for row in rows] == [0.5, 1.23456e-5, 1.0]
    assert (float(rows[0]["pq"]), rows[0]["step"], rows[2]["pq"]) == (0.31234, "1500", "")
    assert [row["data.kind"] for row in rows] == ["z", "x,y", "z"]
    assert [row["loss.kind"] for row in rows] == ["true", "none", "false"]
    assert rows[2]["cause"] == "OSError: no space"


HOSTILE = "=1+1\x1b[2J\ntrial-009  finished  99.9\u202e\udcff"


def test_names_from_outside_neither_begin_a_line_nor_shift_a_column() -> None:
    records = [
        TrialRecord(HOSTILE, {HOSTILE: HOSTILE, "data.kind": "猫"}, HOSTILE, [(250, 0.1)], HOSTILE),
        TrialRecord("trial-001", {HOSTILE: 10_000 * "x", "data.kind": "a"}, "finished", [(250, 0.2)]),
        TrialRecord("trial-002", {HOSTILE: -1.5, "data.kind": "a"}, "finished", [(250, 0.3)]),
    ]
    lines = report.table(records).split("\n")
    assert len(lines) == 5
    assert len(set(map(columns.width, lines[:4]))) == 1
    assert max(map(len, lines[:4])) < 400
    for text in (*lines, *report.importance_text(records).split("\n")):
        assert text.isprintable()
        assert not text.startswith("trial-009")


def test_a_spreadsheet_computes_nothing() -> None:
    values = {"data.kind": "@SUM(1)", "optimizer.lr": -1.5, HOSTILE: "+1"}
    text = report.csv([TrialRecord("=trial", values, "-x", [(250, 0.1)], HOSTILE)])
    assert text.isascii()
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["trial"] == "'=trial"
    assert row["status"] == "'-x"
    assert row["data.kind"] == "'@SUM(1)"
    assert float(row["optimizer.lr"]) == -1.5
    assert not [each for pair in row.items() for each in pair if each.startswith(("=", "+", "@"))]
    assert len(text.splitlines()) == 2
