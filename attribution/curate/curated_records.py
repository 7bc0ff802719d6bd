"""Make a folder of LLaVA records from another one: records left out of one split, the rest linked."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from attribution.curate.curated_folder import copy_file
from attribution.curate.drop_rule import Choice, describe_domain, read_dropped_numbers
from attribution.errors import AttributionError
from data_processing.llava_records import group_of
from foundation.errors import file_errors
from foundation.progress import progress_bar
from score_store.samples import IMAGES


def write_records(target: Path, source: Path, split: str, choice: Choice, dropped: Path) -> dict[str, Any]:
    """Write the split without the dropped records, link the other splits and all images, and return what became of
    each domain.

    A record that stays has a new position in its file, and so a new sample id.

    Args:
        dropped: the file that `choose` wrote.

    Raises:
        AttributionError: the source cannot be read, or no record is left.
    """
    path = source / f"{split}.json"
    with file_errors(path, AttributionError):
        records = json.loads(path.read_text(encoding="utf-8"))
    gone = {
        int(number)
        for domain in choice.dropped
        for numbers in read_dropped_numbers(dropped, "samples", domain)
        for number in numbers
    }
    kept = [record for number, record in enumerate(records) if number not in gone]
    if not kept:
        raise AttributionError(f"--drop: no record would be left ({choice.reason}); choose fewer")
    (target / path.name).write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    others = [each for each in source.glob("*.json") if each != path and not each.name.startswith(".")]
    images = [each for each in (source / IMAGES).rglob("*") if each.is_file()]
    with progress_bar("linking images", sum(each.stat().st_size for each in images + others), "B") as bar:
        for each in sorted(others + images):
            place = target / each.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            copy_file(each, place, bar)
    return describe_domains(records, choice, path.stem)


def describe_domains(records: list[Any], choice: Choice, stem: str) -> dict[str, Any]:
    """Return each domain's entry in the manifest. Bad records, which the run skipped, are of none.

    Args:
        stem: of the records' file.
    """
    images = [record.get("image") for record in records if isinstance(record, dict)]
    units = Counter(group_of(Path(image), stem) for image in images if isinstance(image, str) and image)
    return {domain: describe_domain(choice, domain, count) for domain, count in sorted(units.items())}
