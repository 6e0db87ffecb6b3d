"""Data: Parquet files as rows on disk, images and corpora by name or path, small tables."""

from pvi.datasets.corpora import Corpus, Documents, corpus, reuters
from pvi.datasets.images import Binarized, Images, images
from pvi.datasets.parquet import ParquetRows, parquet
from pvi.datasets.tables import Table, diabetes, digits

__all__ = [
    "Binarized",
    "Corpus",
    "Documents",
    "Images",
    "ParquetRows",
    "Table",
    "corpus",
    "diabetes",
    "digits",
    "images",
    "parquet",
    "reuters",
]
