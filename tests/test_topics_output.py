"""Corpora from files, topics as tables, groups, pictures and a page, and the command."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import sparse
from typer.testing import CliRunner

from docs import generate_topics
from pvi.cli import app
from pvi.datasets import Corpus, Documents, corpus, reuters
from pvi.errors import DataError, FitError, PviError
from pvi.models.topics import LDA, metrics, output
from pvi.models.topics.search import search_topics
from pvi.plots import topics as plots

K, NUM_WORDS = 3, 30
WORDS = np.array([kind + letter for kind in ("apple", "boat", "car") for letter in "abcdefghij"])


def planted(num: int = 120, seed: int = 0) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Documents of one of three topics each, with ten words of its own."""
    rng = np.random.default_rng(seed)
    label = np.arange(num) % K
    beta = np.full((K, NUM_WORDS), 0.1 / 20)
    for k in range(K):
        beta[k, 10 * k : 10 * k + 10] = 0.09
    beta /= beta.sum(1, keepdims=True)
    return sparse.csr_matrix(np.array([rng.multinomial(30, beta[k]) for k in label])), label


def documents(num: int = 120) -> Documents:
    counts, label = planted(num)
    days = np.datetime64("2020-01-01") + np.arange(num)
    texts = [" ".join(np.repeat(WORDS, row)) for row in counts.toarray()]
    sequences = [np.repeat(np.arange(NUM_WORDS), row) for row in counts.toarray()]
    return Documents(counts, WORDS[10 * label], days, texts, sequences)


@pytest.fixture(scope="module")
def whole() -> Corpus:
    rows = np.arange(120)
    return Corpus(documents().take(rows[:100]), documents().take(rows[100:]), WORDS, "planted")


@pytest.fixture(scope="module")
def fitted(whole: Corpus) -> LDA:
    made = LDA(K, hidden=(16,), epochs=25, batch_size=20, lr=0.05, random_state=0)
    return made.fit(whole.train.counts)


def write_csv(folder: Path) -> Path:
    found = documents(60)
    texts, labels, days = found.texts or [], found.labels, found.times
    assert labels is not None and days is not None
    rows = [f"{t},{y},{d}" for t, y, d in zip(texts, labels, days, strict=True)]
    path = folder / "corpus.csv"
    path.write_text("\n".join(["text,label,time", *rows]))
    return path


# Corpora


def test_a_table_becomes_a_corpus(tmp_path: Path) -> None:
    read = corpus(write_csv(tmp_path), test_share=0.25, min_df=1, max_df=1.0)
    assert (len(read.train), len(read.test)) == (45, 15)
    assert read.vocabulary.tolist() == WORDS.tolist()
    whole = documents(60)
    for part in (read.train, read.test):
        assert part.texts is not None and part.sequences is not None and part.labels is not None
        at = [(whole.texts or []).index(text) for text in part.texts]
        np.testing.assert_array_equal(part.counts.toarray(), whole.counts[at].toarray())
        np.testing.assert_array_equal(part.labels, whole.labels[at])  # type: ignore[index]
        assert (part.times == whole.times[at]).all()  # type: ignore[index]
        counted = [np.bincount(s, minlength=NUM_WORDS) for s in part.sequences]
        np.testing.assert_array_equal(counted, part.counts.toarray())


def test_lines_of_json_and_words_left_out(tmp_path: Path) -> None:
    texts = ["the cat sat", "the cat ran off", "a dog ran", "", None]
    rows = [json.dumps({"body": text, "year": 2000 + i}) for i, text in enumerate(texts)]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    read = corpus(
        tmp_path / "x.jsonl", text="body", time="year", test_share=0.0, min_df=2, max_df=1.0
    )
    assert read.vocabulary.tolist() == ["cat", "ran"]
    assert read.train.counts.sum(1).ravel().tolist() == [[1, 2, 1, 0, 0]]
    assert [s.tolist() for s in read.train.sequences or []][:2] == [[-1, 0, -1], [-1, 0, 1, -1]]
    assert read.train.times is not None and read.train.times.tolist() == list(range(2000, 2005))
    assert len(read.test) == 0


@pytest.mark.parametrize("halves", [False, True])
def test_arrays_become_a_corpus(tmp_path: Path, halves: bool) -> None:
    counts, label = planted(40)
    arrays: dict[str, Any] = {"vocab": WORDS}
    rows = {"train_": slice(0, 30), "test_": slice(30, 40)} if halves else {"": slice(0, 40)}
    for prefix, part in rows.items():
        some = counts[part]
        arrays |= {f"{prefix}{n}": getattr(some, n) for n in ("data", "indices", "indptr", "shape")}
        arrays[f"{prefix}labels"] = label[part]
    np.savez(tmp_path / "x.npz", **arrays)
    read = corpus(tmp_path / "x.npz", test_share=0.25)
    assert (len(read.train), len(read.test)) == (30, 10)
    assert read.train.counts.sum() + read.test.counts.sum() == counts.sum()
    if halves:
        assert (read.test.counts != counts[30:]).nnz == 0
        np.testing.assert_array_equal(read.test.labels, label[30:])  # type: ignore[arg-type]


def test_scipys_own_file_is_read(tmp_path: Path) -> None:
    counts, _ = planted(40)
    sparse.save_npz(tmp_path / "x.npz", counts)
    read = corpus(tmp_path / "x.npz")
    assert read.vocabulary[:2].tolist() == ["0", "1"] and len(read.train) == 36


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    path = write_csv(tmp_path)
    np.savez(tmp_path / "bad.npz", data=[1])
    (tmp_path / "x.txt").write_text("")
    arrays = {"data": [1], "indices": [0], "indptr": [0, 1], "shape": [1, 1]}
    np.savez(tmp_path / "dates.npz", **arrays, times=["2020-01-01"])
    np.savez(tmp_path / "half.npz", **arrays | {"data": [0.5]})
    np.savez(tmp_path / "endless.npz", **arrays, times=[np.inf])
    sparse.save_npz(tmp_path / "coo.npz", sparse.coo_matrix([[1.0]]))
    np.savez(tmp_path / "objects.npz", **arrays, labels=np.array(["a"], object))
    cases = [
        (lambda: corpus(tmp_path / "none.csv"), "there is no corpus"),
        (lambda: corpus(path, text="body"), "no column 'body'; it has text, label, time"),
        (lambda: corpus(path, time="label"), "numbers or dates"),
        (lambda: corpus(path, test_share=1.0), "test_share"),
        (lambda: corpus(path, min_df=1000), "min_df"),
        (lambda: corpus(tmp_path / "bad.npz"), "no array 'indices'"),
        (lambda: corpus(tmp_path / "x.txt"), ".csv, .jsonl or .npz"),
        (lambda: corpus(tmp_path / "dates.npz"), "times must be numbers or datetime64"),
        (lambda: corpus(tmp_path / "objects.npz"), "not as objects"),
        (lambda: corpus(tmp_path / "half.npz"), "counts must be whole numbers"),
        (lambda: corpus(tmp_path / "coo.npz"), "no array 'indices'"),
        (lambda: corpus(tmp_path / "endless.npz"), "a time is infinite"),
        (lambda: corpus(path, stop_words="foo"), "stop_words"),
    ]
    for call, named in cases:
        with pytest.raises(DataError, match=named):
            call()


def test_reuters_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lda", None)
    with pytest.raises(DataError, match="pip install lda"):
        reuters()
    monkeypatch.undo()
    pytest.importorskip("lda")
    found, vocabulary = reuters()
    assert found.counts.shape == (395, len(vocabulary)) == (395, 4258)
    assert found.labels is not None and found.labels[0] == "UK"
    assert found.times is not None and str(found.times[0]) == "1996-08-20"


# Tables and groups


def test_the_planted_topics_are_found(fitted: LDA, whole: Corpus) -> None:
    table = output.top_words_table(
        fitted, WORDS, shares=fitted.transform(whole.train.counts), X=whole.train.counts
    )
    kinds = {words[:3] for words in table["words"]}
    assert kinds == {"app", "boa", "car"}
    for words in table["words"]:
        assert len({word[:3] for word in words.split(", ")}) == 1
    assert table["share"].sum() == pytest.approx(1.0)
    assert table["share"].is_monotonic_decreasing


def test_a_group_is_the_mean_of_its_documents() -> None:
    rng = np.random.default_rng(0)
    shares, labels = rng.dirichlet(np.ones(4), 50), rng.choice(["a", "b", ""], 50)
    found = output.topics_by_label(shares, labels)
    assert found.groups.tolist() == ["a", "b"]
    for g, label in enumerate("ab"):
        part = shares[labels == label]
        np.testing.assert_allclose(found.mean[g], part.mean(0))
        np.testing.assert_allclose(found.se[g], part.std(0, ddof=1) / len(part) ** 0.5)
        assert found.counts[g] == len(part)
    assert found.to_pandas().loc["b", "documents"] == (labels == "b").sum()


def test_periods_have_equal_lengths_and_hold_all_documents() -> None:
    rng = np.random.default_rng(0)
    shares, times = rng.dirichlet(np.ones(2), 200), rng.uniform(0, 10, 200)
    times[:2] = 0, 10
    found = output.topics_over_time(shares, times, num_bins=5)
    np.testing.assert_allclose(found.groups, [1, 3, 5, 7, 9])
    for g in range(5):
        inside = (times >= 2 * g) & (times < 2 * g + 2) if g < 4 else times >= 8
        np.testing.assert_allclose(found.mean[g], shares[inside].mean(0))
    assert found.counts.sum() == 200


def test_dates_that_are_missing_and_few_years() -> None:
    dates = np.array(["2020-01-01", "2020-03-01", "NaT", "2020-01-01"], dtype="datetime64[D]")
    shares = np.array([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5], [0.4, 0.6]])
    found = output.topics_over_time(shares, dates)
    assert [str(t)[:10] for t in found.groups] == ["2020-01-01", "2020-03-01"]
    np.testing.assert_allclose(found.mean, [[0.3, 0.7], [1.0, 0.0]])
    assert np.isnan(found.se[1]).all()
    some = output.topics_over_time(shares, dates, min_documents=2)
    assert [str(t)[:10] for t in some.groups] == ["2020-01-01"]
    with pytest.raises(DataError, match="min_documents"):
        output.topics_over_time(shares, dates, min_documents=3)
    with pytest.raises(DataError, match="infinite"):
        output.topics_over_time(shares, [1.0, np.inf, 2.0, 3.0])
    by_label = output.topics_by_label(shares, [1.0, np.nan, 2.0, 1.0])
    assert by_label.groups.tolist() == [1.0, 2.0] and by_label.counts.tolist() == [2, 1]


def test_short_documents_represent_no_topic() -> None:
    shares = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]])
    counts = sparse.csr_matrix([[1, 0], [30, 0], [0, 30]])
    found = output.representative_documents(shares, n=1, X=counts)
    assert found.tolist() == [[1], [2]]
    with pytest.raises(DataError, match="min_tokens"):
        output.representative_documents(shares, X=counts, min_tokens=99)


def test_what_pyldavis_takes(fitted: LDA, whole: Corpus) -> None:
    counts = sparse.vstack([whole.train.counts, sparse.csr_matrix((1, NUM_WORDS))]).tolil()
    counts[:, 4] = 0
    counts = counts.tocsr()
    found = output.ldavis(fitted, counts, WORDS)
    assert found["topic_term_dists"].shape == (K, NUM_WORDS - 1)
    assert found["doc_topic_dists"].shape == (100, K)
    assert "applee" not in found["vocab"] and found["doc_lengths"].min() > 0
    for name in ("topic_term_dists", "doc_topic_dists"):
        np.testing.assert_allclose(found[name].sum(1), 1.0, atol=1e-6)
    assert found["term_frequency"].sum() == found["doc_lengths"].sum() == counts.sum()


# Posteriors of documents


def test_the_bound_rises_with_samples_and_lies_above_the_elbo(fitted: LDA, whole: Corpus) -> None:
    counts = whole.test.counts
    few, many = (metrics.heldout_bound(fitted, counts, num_samples=n) for n in (1, 200))
    assert many.mean > few.mean
    assert many.perplexity < NUM_WORDS
    elbo = fitted.score_samples(counts, num_samples=200)
    se = (many.documents - elbo).std(ddof=1) / len(elbo) ** 0.5
    assert (many.documents - elbo).mean() > -2 * se
    again = metrics.heldout_bound(fitted, counts, num_samples=200)
    np.testing.assert_array_equal(again.documents, many.documents)


def test_kl_of_topics_in_use_and_of_an_empty_corpus(fitted: LDA, whole: Corpus) -> None:
    found = metrics.kl_per_topic(fitted, whole.test.counts)
    assert found.shape == (K,) and (found > 0.1).all()
    with pytest.raises(DataError, match="none"):
        metrics.kl_per_topic(fitted, sparse.csr_matrix((3, NUM_WORDS)))


# Pictures, page, search, command


def test_distances_of_topics() -> None:
    beta = np.array([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 0.5, 0.0]])
    found = plots.topic_distances(beta)
    np.testing.assert_allclose(np.diag(found), 0.0, atol=1e-7)
    assert found[0, 1] == pytest.approx(1.0)  # nothing in common
    assert found[0, 2] == pytest.approx(np.sqrt(0.5))  # by hand: half of both is common
    places = plots.topic_positions(beta)  # three points fit in the plane
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
    np.testing.assert_allclose(apart, found, atol=1e-7)


def test_pictures_are_drawn(whole: Corpus) -> None:
    beta, times = np.random.default_rng(0).dirichlet(np.ones(8), 5), np.arange(4.0)
    shares = np.random.default_rng(1).dirichlet(np.ones(5), 4)
    made = [
        plots.plot_topic_map(beta, shares[0]),
        plots.plot_topic_words([list("abc")] * 5, beta[:, :3]),
        plots.plot_topic_heatmap(shares, "abcd", range(5)),
        plots.plot_topic_similarity(beta),
        plots.plot_topics_over_time(times, shares, 0.01 * shares),
        plots.plot_topic_search([2, 2, 3], {"x": [1.0, 2.0, 3.0]}, 2),
    ]
    assert all(isinstance(figure, Figure) and figure.axes for figure in made)
    with pytest.raises(PviError, match="shares"):
        plots.plot_topic_map(beta, shares[:, 0])
    with pytest.raises(PviError, match="expected values"):
        plots.plot_topic_heatmap(shares, "abc", range(5))


def test_the_page_says_it_all(fitted: LDA, whole: Corpus, tmp_path: Path) -> None:
    report = output.TopicReport(fitted, whole)
    report.write(tmp_path, "Planted")
    page = (tmp_path / "index.html").read_text()
    for part in ("perplexity", "NPMI", "C_V", "accuracy", "By label", "Over time", "held out"):
        assert part in page
    assert "apple" in page and "How topics change" not in page
    names = {path.name for path in tmp_path.iterdir()}
    assert {"topics.csv", "shares.npy", "pyldavis.npz", "map.png", "labels.png"} <= names
    assert {"topics_by_label.csv", "topics_over_time.csv"} <= names
    with np.load(tmp_path / "pyldavis.npz") as arrays:
        assert set(arrays) == set(output.ldavis(fitted, whole.train.counts, WORDS))
    numbers = {name: value for name, value, _ in report.numbers()}
    assert float(numbers["accuracy"]) == 1.0  # each label has words of its own
    assert float(numbers["perplexity"]) == pytest.approx(
        metrics.dc_perplexity(fitted, whole.test.counts), abs=0.5
    )


def test_search_finds_the_planted_number(whole: Corpus) -> None:
    model = LDA(hidden=(16,), epochs=12, batch_size=20, lr=0.05)
    found = search_topics(model, whole.train.counts, whole.test.counts, [2, 3])
    assert found.best() == 3 and found.n_components.tolist() == [2, 3]
    assert found.perplexity[1] < found.perplexity[0]
    assert isinstance(found.plot(), Figure) and "lowest perplexity: 3 topics" in str(found)
    assert len(found.to_pandas()) == 2
    with pytest.raises(FitError, match="by:"):
        found.best("beauty")
    with pytest.raises(FitError, match="numbers of topics"):
        search_topics(model, whole.train.counts, whole.test.counts, [1, 2])


def test_the_command(tmp_path: Path) -> None:
    path, out = write_csv(tmp_path), tmp_path / "out"
    words = ["topics", str(path), "--model", "lda", "-k", "3", "--epochs", "2", "--min-df", "1"]
    words += ["--max-df", "1.0"]
    found = CliRunner().invoke(app, [*words, "--out", str(out)])
    assert found.exit_code == 0, found.output
    assert "54 documents, 6 more held out" in found.output and "lda, " in found.output
    assert (out / "index.html").is_file() and (out / "model").is_dir()
    shares = np.load(out / "shares.npy")
    loaded = LDA.load(out / "model")
    read = corpus(path, min_df=1, max_df=1.0)
    np.testing.assert_allclose(loaded.transform(read.train.counts), shares, atol=1e-6)


def test_the_command_with_few_words(tmp_path: Path) -> None:
    words = ["topics", str(write_csv(tmp_path)), "--model", "lda", "-k", "3", "--epochs", "2"]
    words += ["--min-df", "1", "--max-df", "1.0", "--max-words", "6", "--out", str(tmp_path / "o")]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output


def test_the_command_shows_how_topics_change(tmp_path: Path) -> None:
    words = ["topics", str(write_csv(tmp_path)), "--model", "dynamic", "-k", "2", "--epochs", "1"]
    out = tmp_path / "o"
    words += ["--min-df", "1", "--max-df", "1.0", "--out", str(out)]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    page = (out / "index.html").read_text()
    assert "How topics change" in page and "2020-01-03" in page  # the middle of the first period


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--model", "gpt"], 2, "--model: expected one of prodlda"),
        (["--text", "body"], 1, "no column 'body'"),
        (["--stop-words", "foo"], 2, "--stop-words: expected english or none"),
        (["--model", "dynamic", "--time", "none"], 1, "no training document has one"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    path = write_csv(tmp_path)
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{header},none", *(f"{line}," for line in lines)]))
    words = ["--min-df", "1", "--max-df", "1.0", *words]
    found = CliRunner().invoke(app, ["topics", str(path), "--out", str(tmp_path / "o"), *words])
    assert found.exit_code == code and said in found.output


def test_the_page_of_results_is_that_of_the_results() -> None:
    """Else run `python -m docs.generate_topics`."""
    assert generate_topics.PAGE.read_text(encoding="utf-8") == generate_topics.page()


@pytest.mark.filterwarnings("ignore:training ended after:UserWarning")
def test_the_example(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lda")
    out = tmp_path / "out"
    words = ["x", "--topics", "4", "--epochs", "1", "--search", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    path = Path(__file__).parents[1] / "examples" / "topics_reuters.py"
    runpy.run_path(str(path))
    assert "perplexity of held-out documents" in capsys.readouterr().out
    assert (out / "index.html").is_file()


def test_names_with_dollars_and_long_names() -> None:
    figure = plots.plot_topic_heatmap([[0.5, 0.5]], ["cost $\\alpah$ x"], ["b" * 90, "c"])
    figure.canvas.draw()
    shown = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert len(shown[0]) < 40
    plots.plot_topic_map([[0.7, 0.3], [0.2, 0.8]], [0.5, 0.5], ["$a_{", "b"]).canvas.draw()


def test_columns_first_are_read_as_such(tmp_path: Path) -> None:
    """A square matrix by columns would else be taken for its transpose."""
    counts = np.arange(100).reshape(10, 10) % 7
    sparse.save_npz(tmp_path / "csc.npz", sparse.csc_matrix(counts))
    found = corpus(tmp_path / "csc.npz", test_share=0.0)
    np.testing.assert_array_equal(found.train.counts.toarray(), counts)


def test_labels_stay_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(
        "text,label,time\nwords,01,3\nwords,NA,\nwords,,NA\nmore,EU,5\n"
    )
    found = corpus(tmp_path / "x.csv", test_share=0.0, min_df=1, max_df=1.0).train
    assert found.labels is not None and found.labels.tolist() == ["01", "NA", "", "EU"]
    assert found.times is not None and found.times[[0, 3]].tolist() == [3.0, 5.0]
    assert np.isnan(found.times[[1, 2]]).all()
