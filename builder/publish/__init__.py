"""What a finished dataset needs beside its shards to be published: `builder publish-files`.

This file imports nothing heavy, so that `builder verify` can ask which files are ours.
"""

CARD = "README.md"
DATASHEET = "datasheet.md"
CITATION = "CITATION.cff"
CROISSANT = "croissant.json"
STATISTICS = "statistics.json"
PARAMETERS = "parameters/params.parquet"
GALLERY = "gallery/index.html"
SUMS = "SHA256SUMS"

# Every file that `builder publish-files` writes, in the order written.
PUBLISHED = (PARAMETERS, STATISTICS, GALLERY, CITATION, DATASHEET, CARD, CROISSANT, SUMS)


def is_published(name: str) -> bool:
    """Whether a file of a dataset, named from its root, is one that publish-files writes."""
    return name in PUBLISHED
