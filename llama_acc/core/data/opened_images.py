"""Images of checked items are opened: an item whose image cannot be opened is none."""

from collections.abc import Sequence
from pathlib import Path

from llama_acc.core.data.findings import Finding, beginning
from llama_acc.core.data.image_workers import ImageWorkers, default_workers
from llama_acc.core.data.images import resolved
from llama_acc.core.data.readers import Checked

_AT_ONCE = 64


class ImageOpener:
    """Opens images in processes of its own, which are started when there is a first one. Use it in a `with` block."""

    def __init__(self, max_pixels: int) -> None:
        """Args:
        max_pixels: larger pictures are refused, as by `data.images.max_pixels`.
        """
        self._max_pixels = max_pixels
        self._workers: ImageWorkers | None = None

    def __enter__(self) -> "ImageOpener":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._workers is not None:
            self._workers.close()

    def opened(self, rows: Sequence[Checked], root: Path) -> list[Checked]:
        """The same rows; of an item with a bad image, what is wrong with it instead."""
        references = dict.fromkeys(
            resolved(image, root) for row in rows if row.item is not None for image in row.item.images
        )
        if not references:
            return list(rows)
        problems = self._problems(list(references))
        return [_with_image(row, problems, root) for row in rows]

    def _problems(self, references: list[str]) -> dict[str, str]:
        if self._workers is None:
            self._workers = ImageWorkers(default_workers())
        parts = [references[i : i + _AT_ONCE] for i in range(0, len(references), _AT_ONCE)]
        answers = [self._workers.check(part, self._max_pixels) for part in parts]
        found = zip(references, (problem for answer in answers for problem in answer.result()), strict=True)
        return {reference: problem for reference, problem in found if problem is not None}


def _with_image(row: Checked, problems: dict[str, str], root: Path) -> Checked:
    images = () if row.item is None else row.item.images
    found = [
        Finding("image_file", row.where, "image", f"the image {problems[resolved(image, root)]}", beginning(image))
        for image in images
        if resolved(image, root) in problems
    ]
    return Checked(row.where, None, found) if found else row
