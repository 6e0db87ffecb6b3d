"""Corpora as sparse counts of words: from texts in tables, from arrays, from a package."""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pvi.errors import DataError

WORD = r"(?u)\b[^\W\d_]{3,}\b"  # three letters or more
MISSING = ["", "NA", "N/A", "NaN", "nan", "NaT", "null", "None"]  # among times
VOCABULARY = ("vocab", "vocabulary", "feature_names")


@dataclass(frozen=True)
class Documents:
    """Some documents of a corpus.

    Attributes:
        counts: of words `(N, V)`, scipy's CSR.
        labels: `(N,)`, or None.
        times: `(N,)`, numbers or dates, or None.
        texts: titles or whole texts, or None.
        sequences: each document's tokens in order as numbers of words, -1 for other tokens; None
            where their order is not known.
    """

    counts: Any
    labels: np.ndarray | None = None
    times: np.ndarray | None = None
    texts: list[str] | None = field(default=None, repr=False)
    sequences: list[np.ndarray] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.counts.shape[0]

    def take(self, rows: Any) -> "Documents":
        """The documents of these numbers."""
        return Documents(
            self.counts[rows],
            None if self.labels is None else self.labels[rows],
            None if self.times is None else self.times[rows],
            None if self.texts is None else [self.texts[i] for i in rows],
            None if self.sequences is None else [self.sequences[i] for i in rows],
        )


@dataclass(frozen=True)
class Corpus:
    """Documents to fit topics to, documents held out, and the words that columns stand for."""

    train: Documents
    test: Documents
    vocabulary: np.ndarray
    name: str

    def __str__(self) -> str:
        tokens = int(self.train.counts.sum()) + int(self.test.counts.sum())
        return (
            f"{self.name}: {len(self.train):,} documents, {len(self.test):,} more held out, "
            f"{len(self.vocabulary):,} words, {tokens:,} tokens"
        )


def corpus(
    path: Any,
    *,
    text: str = "text",
    label: str | None = None,
    time: str | None = None,
    test_share: float = 0.1,
    seed: int = 0,
    **words: Any,
) -> Corpus:
    """A corpus from a file, or "reuters", 395 news items that the package `lda` brings along.

    Args:
        path: a `.csv` or `.jsonl` file with a text in each row; or an `.npz` file with the arrays
            data, indices, indptr and shape of a CSR matrix of counts as `scipy.sparse.save_npz`
            writes, vocab, and if known labels and times; all but vocab may be there twice, as
            `train_` and `test_`.
        text, label, time: names of columns in a table; those of labels and times, `label` and
            `time`, are used if they are there. Times are numbers or ISO dates.
        test_share: of documents to hold out, chosen at random by `seed`, unless the file says
            which.
        words: options of scikit-learn's `CountVectorizer`, which learns the words from the training
            documents. By default words have three letters or more, occur in at least 5 documents
            and at most half of them, and are not among English stop words.

    Raises:
        DataError: there is no such file, column or word.
    """
    if str(path) == "reuters":
        found, vocabulary = reuters()
        return Corpus(*_halves(found, test_share, seed), vocabulary, "reuters")
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no corpus {path}; expected a .csv, .jsonl or .npz file")
    if path.suffix == ".npz":
        return _arrays(path, test_share, seed)
    table = _table(path, label or "label", time or "time")
    texts = _column(table, text, path).fillna("").astype(str).tolist()
    whole = Documents(
        np.arange(len(texts))[:, None],
        _labels(table, label, path),
        _times(table, time, path),
        texts,
    )
    return _counted(*_halves(whole, test_share, seed), path.name, words)


def reuters() -> tuple[Documents, np.ndarray]:
    """News of 1996 and 1997 on churches and royal families, with country and date of each.

    Returns:
        395 documents with titles for texts, and their 4,258 words.

    Raises:
        DataError: the package `lda` is not installed.
    """
    try:
        from lda import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError("the Reuters corpus comes with a package: pip install lda") from error
    from scipy.sparse import csr_matrix

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to be closed
        counts, titles = datasets.load_reuters(), datasets.load_reuters_titles()
        vocabulary = np.array(datasets.load_reuters_vocab())
    parts = [re.match(r"\d+ (.*?): .*(\d{4}-\d\d-\d\d)$", title) for title in titles]
    countries = [part[1].split("/")[0] if part else "" for part in parts]
    dates = np.array([part[2] if part else "NaT" for part in parts], dtype="datetime64[D]")
    titles = [title.split(" ", 1)[1] for title in titles]
    return Documents(csr_matrix(counts), np.array(countries), dates, titles), vocabulary


def _arrays(path: Path, test_share: float, seed: int) -> Corpus:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except ValueError as error:
        raise DataError(
            f"{path.name} can't be read: {error}; store labels and words as strings, times as "
            "numbers or datetime64, not as objects"
        ) from error
    vocabulary = next((arrays[name] for name in VOCABULARY if name in arrays), None)
    if "train_data" in arrays:
        train, test = (_documents(arrays, prefix, path) for prefix in ("train_", "test_"))
    else:
        train, test = _halves(_documents(arrays, "", path), test_share, seed)
    number: int = train.counts.shape[1]
    names = np.arange(number).astype(str) if vocabulary is None else vocabulary.astype(str)
    if len(names) != number or test.counts.shape[1] != number:
        raise DataError(
            f"{path.name}: counts of {number} and {test.counts.shape[1]} words, but names of "
            f"{len(names)}"
        )
    return Corpus(train, test, names, path.stem)


def _documents(arrays: dict[str, np.ndarray], prefix: str, path: Path) -> Documents:
    from scipy.sparse import csc_matrix, csr_matrix

    parts = [f"{prefix}{name}" for name in ("data", "indices", "indptr", "shape")]
    if missing := [name for name in parts if name not in arrays]:
        raise DataError(
            f"{path.name} has no array {missing[0]!r}; expected the parts of a CSR matrix of "
            f"counts, {', '.join(parts)}; it has {', '.join(arrays)}"
        )
    data, indices, indptr, shape = (arrays[name] for name in parts)
    stored = str(np.asarray(arrays.get(f"{prefix}format", b"csr")).astype(str))
    kinds: dict[str, Any] = {"csr": csr_matrix, "csc": csc_matrix}
    if stored not in kinds:
        raise DataError(f"{path.name} holds a sparse matrix of format {stored}; store it as CSR")
    try:
        counts: Any = kinds[stored]((data, indices, indptr), shape=tuple(shape)).tocsr()
    except ValueError as error:
        raise DataError(f"{path.name}: {error}") from error
    if counts.nnz and ((counts.data < 0) | (counts.data != np.floor(counts.data))).any():
        raise DataError(f"{path.name}: counts must be whole numbers from 0")
    more = {name: arrays.get(f"{prefix}{name}") for name in ("labels", "times")}
    for name, values in more.items():
        if values is not None and values.shape != (counts.shape[0],):
            raise DataError(
                f"{path.name}: {prefix}{name} has shape {values.shape}, for {counts.shape[0]} "
                "documents"
            )
    times = more["times"]
    if times is not None and times.dtype.kind not in "iufM":
        raise DataError(
            f"{path.name}: {prefix}times must be numbers or datetime64, got {times.dtype}; strings "
            "become dates by astype('datetime64[D]')"
        )
    return Documents(counts, more["labels"], _finite(times, path))


def _table(path: Path, label: str, time: str) -> Any:
    import pandas

    as_written = {"keep_default_na": False, "dtype": {label: str}}  # labels such as 01 and NA
    readers = {
        ".csv": lambda file: pandas.read_csv(file, na_values={time: MISSING}, **as_written),
        ".jsonl": lambda file: pandas.read_json(file, lines=True),
    }
    if path.suffix not in readers:
        raise DataError(f"a corpus must be a .csv, .jsonl or .npz file, got {path.name}")
    try:
        return readers[path.suffix](path)
    except ValueError as error:
        raise DataError(f"{path.name} can't be read: {error}") from error


def _column(table: Any, name: str, path: Path) -> Any:
    if name not in table.columns:
        known = ", ".join(map(str, table.columns))
        raise DataError(f"{path.name} has no column {name!r}; it has {known}")
    return table[name]


def _labels(table: Any, name: str | None, path: Path) -> np.ndarray | None:
    if name is None and "label" not in table.columns:
        return None
    return _column(table, name or "label", path).fillna("").astype(str).to_numpy(dtype=str)


def _times(table: Any, name: str | None, path: Path) -> np.ndarray | None:
    import pandas

    if name is None and "time" not in table.columns:
        return None
    column = _column(table, name or "time", path)
    if column.dtype.kind in "iuf":
        return _finite(column.to_numpy(), path)
    try:
        return (
            pandas.to_datetime(column, utc=True, format="ISO8601").dt.tz_localize(None).to_numpy()
        )
    except ValueError as error:
        raise DataError(
            f"{path.name}: column {column.name!r} should hold numbers or dates such as "
            f"2026-01-31: {error}"
        ) from error


def _finite(times: np.ndarray | None, path: Path) -> np.ndarray | None:
    if times is not None and times.dtype.kind == "f" and np.isinf(times).any():
        raise DataError(f"{path.name}: a time is infinite; leave it empty where it is not known")
    return times


def _halves(whole: Documents, test_share: float, seed: int) -> tuple[Documents, Documents]:
    """Documents to train on and to hold out, each in the order of the file."""
    if not 0 <= test_share < 1:
        raise DataError(f"test_share must be at least 0 and below 1, got {test_share}")
    order = np.random.default_rng(seed).permutation(len(whole))
    held = round(test_share * len(whole))
    return whole.take(np.sort(order[held:])), whole.take(np.sort(order[:held]))


def _counted(train: Documents, test: Documents, name: str, options: dict[str, Any]) -> Corpus:
    """The texts' words counted, and their order kept."""
    try:
        from sklearn.feature_extraction.text import CountVectorizer
    except ImportError as error:
        raise DataError("texts are counted by scikit-learn: pip install 'pvi[topics]'") from error
    defaults = {"min_df": 5, "max_df": 0.5, "stop_words": "english", "token_pattern": WORD}
    vectorizer = CountVectorizer(**defaults | options)
    try:
        counts = vectorizer.fit_transform(train.texts)
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error
    counted = [counts, vectorizer.transform(test.texts) if len(test) else counts[:0]]
    split, clean = vectorizer.build_tokenizer(), vectorizer.build_preprocessor()
    known = vectorizer.vocabulary_
    first, second = (
        Documents(
            found.tocsr(),
            part.labels,
            part.times,
            part.texts,
            [np.array([known.get(w, -1) for w in split(clean(t))], int) for t in part.texts or ()],
        )
        for part, found in zip((train, test), counted, strict=True)
    )
    return Corpus(first, second, vectorizer.get_feature_names_out(), name)
