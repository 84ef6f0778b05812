"""The result of checking a data set: a summary for people, and JSON for programs."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.data.coco import CocoDataset
from pipelines.data.findings import CODES, Finding, Findings

REPORT_VERSION = 1

_EXAMPLES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """All that was found in a data set."""

    dataset: CocoDataset
    findings: Findings

    @property
    def has_errors(self) -> bool:
        return self.findings.count("error") > 0

    @property
    def images_with_errors(self) -> list[int]:
        """Ids of the images that have an error, ascending."""
        return sorted(self.findings.images)

    def refusal(self, skip_bad: bool) -> str | None:
        """Return why the data set cannot be packed; None if it can.

        Args:
            skip_bad: the images with errors are left out.
        """
        if not self.has_errors:
            return None
        if codes := self.findings.of_whole_set:
            return f"Nothing was packed. Correct the categories first ({', '.join(codes)}): they concern all images."
        bad, ids = self.images_with_errors, self.dataset.records["image_id"].to_numpy()
        if not skip_bad:
            return (
                f"The data set has errors, so nothing was packed. Correct them, or leave out the "
                f"{len(bad)} images with errors with --skip-bad."
            )
        return None if len(np.setdiff1d(ids, bad)) else "All images have errors, so nothing was packed. Correct them."

    def summary(self) -> str:
        """Return a text of a few lines for each code that occurred."""
        counts = ", ".join(f"{self.findings.count(kind)} {kind}s" for kind in ("error", "warning", "note"))
        lines = [
            f"{len(self.dataset.records)} images checked: {counts}; {len(self.images_with_errors)} images have an error"
        ]
        for code in self.findings.codes():
            count, known = self.findings.counts[code], CODES[code]
            lines.append(f"{known.severity}: {code}, {count} times: {known.meaning}")
            shown = self.findings.examples[code][: 1 if known.severity == "note" else _EXAMPLES_SHOWN]
            lines += [f"  {finding}" for finding in shown]
            if count > len(shown):
                lines.append(f"  ... and {count - len(shown)} more")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the whole report as JSON; docs/data.md describes it."""
        codes = {
            code: {
                **asdict(CODES[code]),
                "count": self.findings.counts[code],
                "examples": [_example(finding) for finding in self.findings.examples[code]],
            }
            for code in self.findings.codes()
        }
        layout = self.dataset.layout
        content = {
            "version": REPORT_VERSION,
            "split": layout.split,
            "annotations": str(layout.annotations),
            "annotations_sha256": self.dataset.annotations_sha256,
            "images_checked": len(self.dataset.records),
            **{f"{kind}s": self.findings.count(kind) for kind in ("error", "warning", "note")},
            "images_with_errors": self.images_with_errors,
            "codes": codes,
        }
        return json.dumps(content, indent=1) + "\n"


def _example(finding: Finding) -> dict[str, Any]:
    return {
        "file": finding.file,
        "image_id": finding.image_id,
        "segment_id": finding.segment_id,
        "message": finding.message,
    }
