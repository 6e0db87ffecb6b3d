"""Data: Parquet files as rows on disk, images by name or path, small tables for demonstrations."""

from pvi.datasets.images import Binarized, Images, images
from pvi.datasets.parquet import ParquetRows, parquet
from pvi.datasets.tables import Table, diabetes, digits

__all__ = [
    "Binarized",
    "Images",
    "ParquetRows",
    "Table",
    "diabetes",
    "digits",
    "images",
    "parquet",
]
