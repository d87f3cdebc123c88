"""Merge the two independent passes over the changes since 2016 into `data/updates.jsonl`, ready to be fitted.

    PYTHONPATH=src python scripts/merge_update_passes.py

A change ships when both passes name the same new value, the second is sure that it still holds, and Atlas still states the
old value (the first pass wrote against the unmerged tables). Every line is an edit request with the `fit` phrasings.
"""

import csv
import json
from pathlib import Path

from errata.atlas.requests import request_for
from errata.atlas.world import link, load_world
from errata.edit import write_requests
from merge_fact_passes import REVIEW, TABLES, agree

ABOUT = {
    "as_of": "2026-05",
    "what": "Facts of Atlas (1 January 2016) that have changed since, with the values that held at as_of.",
    "checked": "Two independent passes (2026-11); only changes on which both agree. Nothing later than May 2026 was seen.",
}


def main() -> None:
    world = load_world()
    first = [json.loads(line) for line in (REVIEW / "first" / "updates.jsonl").read_text(encoding="utf-8").splitlines()]
    with (REVIEW / "second" / "updates.csv").open(encoding="utf-8", newline="") as file:
        second = {(row["subject"], row["relation"]): row for row in csv.DictReader(file)}
    kept, dropped = [], []
    for row in first:
        other = second[row["subject"], row["relation"]]
        fact = world.by_key.get((link(row["subject"]), row["relation"]))
        ok = agree(row["target_new"], other["value_now"]) or agree(other["value_now"], row["target_new"])
        if fact and fact.object == row["target_true"] and ok and other["sure"] == "yes":
            kept.append(request_for(world, fact, row["target_new"], since=row["since"], source=row["source"]))
        else:
            dropped.append(
                f"{row['subject']} / {row['relation']}: {row['target_new']!r} against {other['value_now']!r} ({other['sure']})"
            )
    write_requests(TABLES / "updates.jsonl", kept)
    (Path(TABLES) / "updates.about.json").write_text(json.dumps(ABOUT, indent=1) + "\n", encoding="utf-8")
    print(f"{len(kept)} updates kept, {len(dropped)} dropped:", *dropped, sep="\n")


if __name__ == "__main__":
    main()
