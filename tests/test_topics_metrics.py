"""Each metric against its definition, counted out by hand, and at its edges."""

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from pvi.errors import DataError
from pvi.models.topics import metrics

NUM_WORDS = 30


class Planted:
    """The interface of a fitted model, with known shares and topics."""

    def __init__(self, shares: np.ndarray, components: np.ndarray) -> None:
        self.shares, self.components_ = shares, components

    def transform(self, X: Any) -> np.ndarray:
        assert X.shape[0] == len(self.shares)
        return self.shares


def texts(seed: int = 0, num: int = 60) -> list[list[int]]:
    """Documents as sequences of words, a few short, empty or with unknown words."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(NUM_WORDS, 0.3), num)
    made = [list(rng.choice(NUM_WORDS, rng.integers(1, 40), p=p)) for p in shares]
    return [*made, [], [3], [-1, 3, -1, -1, 4]]


def counted(documents: list[list[int]]) -> sparse.csr_matrix:
    rows = [np.bincount([w for w in d if w >= 0], minlength=NUM_WORDS) for d in documents]
    return sparse.csr_matrix(np.array(rows))


def topics(seed: int = 1, num: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(NUM_WORDS, 0.5), num)


def ranked(row: np.ndarray, top_n: int) -> list[int]:
    return sorted(range(len(row)), key=lambda v: (-row[v], v))[:top_n]


def windows_of(documents: list[list[int]], width: int | None) -> list[set[int]]:
    """The definition: every stretch of `width` tokens as a set of words; short documents whole."""
    if width is None:
        return [set(d) for d in documents]
    return [
        set(d[i : i + width]) for d in documents if d for i in range(max(len(d) - width + 1, 1))
    ]


def share(windows: list[set[int]], *words: int) -> float:
    return sum(set(words) <= w for w in windows) / len(windows)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 100])
def test_npmi_is_its_definition(window: int | None) -> None:
    documents = texts()
    windows = windows_of(documents, window)
    expected = []
    for row in topics():
        values = []
        for a, b in combinations(ranked(row, 6), 2):
            joint = share(windows, a, b)
            ratio = joint / (share(windows, a) * share(windows, b)) if joint else 1.0
            values.append(math.log(ratio) / -math.log(joint) if joint else -1.0)
        expected.append(sum(values) / len(values))
    corpus = documents if window else counted(documents)
    found = metrics.npmi(topics(), corpus, top_n=6, window=window)
    np.testing.assert_allclose(found.topics, expected, rtol=0, atol=1e-12)
    assert found.num_windows == len(windows)
    assert float(found) == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("window", [None, 5])
def test_c_v_is_its_definition(window: int | None) -> None:
    documents = texts()
    windows = windows_of(documents, window)

    def normalised(a: int, b: int) -> float:
        joint = share(windows, a, b) + 1e-12
        return math.log(joint / (share(windows, a) * share(windows, b))) / -math.log(joint)

    def cosine(u: np.ndarray, v: np.ndarray) -> float:
        return float(u @ v / math.sqrt((u @ u) * (v @ v)))

    expected = []
    for row in topics():
        words = ranked(row, 5)
        vectors = np.array([[normalised(a, b) for b in words] for a in words])
        expected.append(np.mean([cosine(v, vectors.sum(0)) for v in vectors]))
    corpus = documents if window else counted(documents)
    found = metrics.c_v(topics(), corpus, top_n=5, window=window)
    np.testing.assert_allclose(found.topics, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("epsilon", [None, 1e-12])
def test_u_mass_is_its_definition(epsilon: float | None) -> None:
    windows = windows_of(texts(), None)
    added = 1 / len(windows) if epsilon is None else epsilon
    expected = []
    for row in topics():
        ordered = combinations(ranked(row, 6), 2)  # the better word first
        values = [math.log((share(windows, a, b) + added) / share(windows, a)) for a, b in ordered]
        expected.append(np.mean(values))
    found = metrics.u_mass(topics(), counted(texts()), top_n=6, epsilon=epsilon)
    np.testing.assert_allclose(found.topics, expected, rtol=0, atol=1e-12)


def test_a_coherence_says_how_it_was_measured() -> None:
    found = metrics.npmi(topics(), texts(), top_n=6, window=5, name="these texts")
    said = str(found)
    for part in ("NPMI", "top 6 words", "windows of 5 tokens", "these texts", "4 topics"):
        assert part in said
    assert "63 documents of corpus" in str(metrics.u_mass(topics(), counted(texts()), top_n=6))


def test_npmi_at_its_edges() -> None:
    corpus = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    values = metrics.npmi(np.array([[0, 1], [0, 3], [2, 3]]), corpus, top_n=2).topics
    np.testing.assert_array_equal(values, [1.0, -1.0, -1.0])  # always, never, word 3 is nowhere
    with pytest.raises(DataError, match="top word does not occur"):
        metrics.u_mass(np.array([[0, 3]]), corpus, top_n=2)
    with pytest.raises(DataError, match="top word does not occur"):
        metrics.c_v(np.array([[0, 3]]), corpus, top_n=2)


def test_topics_as_components_as_words_or_as_a_model_are_the_same() -> None:
    matrix, corpus = topics(), counted(texts())
    words = np.array([ranked(row, 10) for row in matrix])
    model = Planted(np.ones((1, 4)), matrix)
    values = [metrics.npmi(x, corpus).topics for x in (matrix, words, model, matrix * 7)]
    for other in values[1:]:
        np.testing.assert_array_equal(values[0], other)


def test_diversity_by_hand() -> None:
    words = np.array([[0, 1, 2], [2, 1, 0], [3, 4, 0]])
    assert metrics.topic_diversity(words, top_n=3) == pytest.approx(5 / 9)
    assert metrics.topic_diversity(words, top_n=1) == 1.0
    p = 0.9
    # agreement at depths 1, 2, 3 of topics 0 and 1, 0 and 2, 1 and 2
    depths = ([0, 1 / 2, 3 / 3], [0, 0, 1 / 3], [0, 0, 1 / 3])
    overlaps = [
        a[2] * p**3 + (1 - p) / p * sum(x * p ** (d + 1) for d, x in enumerate(a)) for a in depths
    ]
    found = metrics.inverted_rbo(words, top_n=3, p=p)
    assert found == pytest.approx(1 - sum(overlaps) / 3, abs=1e-12)


def test_inverted_rbo_at_its_edges() -> None:
    same = np.array([[4, 2, 0]] * 3)
    assert metrics.inverted_rbo(same, top_n=3) == pytest.approx(0.0, abs=1e-12)
    assert metrics.inverted_rbo(np.arange(6).reshape(2, 3), top_n=3) == 1.0
    with pytest.raises(DataError, match="two topics"):
        metrics.inverted_rbo(same[:1], top_n=3)


def test_tokens_are_split_in_half() -> None:
    corpus = counted(texts())
    first, second = metrics.split_tokens(corpus)
    assert ((first + second) != corpus).nnz == 0
    assert min(first.data.min(), second.data.min()) > 0
    lengths = corpus.sum(1)
    np.testing.assert_array_equal(first.sum(1), (lengths + 1) // 2)
    again, _ = metrics.split_tokens(corpus)
    other, _ = metrics.split_tokens(corpus, seed=1)
    assert (again != first).nnz == 0 and (other != first).nnz > 0


def test_every_token_is_equally_likely_to_be_held_out() -> None:
    corpus = sparse.csr_matrix([[1, 3, 4]] * 4000)
    _, second = metrics.split_tokens(corpus)
    mean = np.asarray(second.mean(0)).ravel()
    # hypergeometric: 4 of 8 tokens, n of them of this word
    n = np.array([1, 3, 4])
    se = np.sqrt(4 * (n / 8) * (1 - n / 8) * (4 / 7) / 4000)
    assert (np.abs(mean - n / 2) < 4 * se).all()


def test_perplexity_is_its_definition() -> None:
    corpus = counted(texts())
    shares = np.random.default_rng(2).dirichlet(np.ones(4), corpus.shape[0])
    beta = topics()
    _, second = metrics.split_tokens(corpus, 3)
    total, tokens = 0.0, 0
    for d, row in enumerate(second.toarray()):
        for v, n in enumerate(row):
            total += n * math.log(sum(shares[d, k] * beta[k, v] for k in range(4)))
            tokens += n
    found = metrics.dc_perplexity(Planted(shares, beta), corpus, seed=3)
    assert found == pytest.approx(math.exp(-total / tokens), rel=1e-12)
    counts = Planted(shares * 5, beta * 9)  # as scikit-learn's LDA: not normalised
    assert metrics.dc_perplexity(counts, corpus, seed=3) == pytest.approx(found, rel=1e-12)


def test_perplexity_of_knowing_nothing_is_the_number_of_words() -> None:
    corpus = counted(texts())
    flat = Planted(np.ones((corpus.shape[0], 2)), np.ones((2, NUM_WORDS)))
    assert metrics.dc_perplexity(flat, corpus) == pytest.approx(NUM_WORDS)
    nothing = sparse.csr_matrix((1, NUM_WORDS), dtype=int)
    assert metrics.unigram_perplexity(nothing, corpus) == pytest.approx(NUM_WORDS)
    assert metrics.unigram_perplexity(corpus, corpus) < NUM_WORDS


def test_a_model_with_its_own_likelihood_is_asked_for_it() -> None:
    class Own:
        def log_likelihood(self, X: Any, given: Any) -> np.ndarray:
            assert ((X + given) != counted(texts())).nnz == 0
            return -2.0 * np.asarray(X.sum(1)).ravel()

    assert metrics.dc_perplexity(Own(), counted(texts())) == pytest.approx(math.exp(2.0))


def test_topics_that_tell_labels_classify() -> None:
    labels = np.arange(200) % 4
    shares = np.full((200, 4), 0.1)
    shares[np.arange(200), labels] = 0.7
    found = metrics.classification(None, shares[:100], labels[:100], shares[100:], labels[100:])
    assert found.accuracy == found.macro_f1 == 1.0 and found.majority == 0.25
    noise = np.random.default_rng(0).dirichlet(np.ones(4), 200)
    found = metrics.classification(None, noise[:100], labels[:100], noise[100:], labels[100:])
    assert found.accuracy < 0.25 + 4 * math.sqrt(0.25 * 0.75 / 100)
    with pytest.raises(DataError, match="train_labels"):
        metrics.classification(None, noise, labels[:9], noise, labels)
    with pytest.raises(DataError, match="test_labels: no document"):
        metrics.classification(None, noise, labels, noise, np.full(200, ""))
    some = np.where(np.arange(200) % 5 == 0, None, labels)
    parts = (shares[:100], some[:100].astype(float), shares[100:], some[100:])
    found = metrics.classification(None, *parts)
    assert (found.num_train, found.num_test) == (80, 80)


def test_collapse_finds_idle_topics_and_copies() -> None:
    rng = np.random.default_rng(0)
    corpus = sparse.csr_matrix(rng.poisson(2.0, (300, NUM_WORDS)))
    own = np.zeros((4, NUM_WORDS))
    own[0, :10] = own[1, 10:20] = own[3, 5:15] = 0.1
    own[2] = np.asarray(corpus.sum(0)).ravel() / corpus.sum()  # the corpus's words
    own[3] = own[0]
    shares = np.column_stack([rng.dirichlet([1, 1], 300) * 0.6, np.full((300, 2), 0.2)])
    found = metrics.collapse(Planted(shares, own), corpus)
    assert found.active.tolist() == [True, True, False, False]
    assert found.duplicate.tolist() == [False, False, False, True]
    assert found.twin[[0, 3]].tolist() == [3, 0]
    np.testing.assert_allclose(found.overlap[[0, 3]], 1.0)
    smoothed = np.asarray(corpus.sum(0)).ravel() + 1
    p = smoothed / smoothed.sum()
    expected = [sum(b * math.log(b / p[v]) for v, b in enumerate(row) if b) for row in own]
    np.testing.assert_allclose(found.kl_words, expected, atol=1e-9)
    assert found.kl_words[2] < 1e-3
    tokens = np.asarray(corpus.sum(1)).ravel()
    np.testing.assert_allclose(found.share, (tokens[:, None] * shares).sum(0) / tokens.sum())
    assert found.leads.sum() == 300
    assert str(found).startswith("2 of 4 topics active")
    few = metrics.collapse(Planted(shares, own[:, 7:13]), corpus[:, 7:13])  # of six words, three
    assert few.twin[[0, 3]].tolist() == [3, 0] and few.duplicate[[1, 3]].tolist() == [False, True]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: metrics.npmi(topics(), counted(texts()), top_n=1), "top_n"),
        (lambda: metrics.npmi(topics(), counted(texts()), top_n=31), "top_n"),
        (lambda: metrics.npmi(topics() * np.nan, counted(texts())), "finite"),
        (lambda: metrics.npmi(topics()[0], counted(texts())), r"\(K, V\)"),
        (lambda: metrics.npmi(topics(), counted(texts())[:, :9]), "vocabulary"),
        (lambda: metrics.npmi(topics(), counted(texts())[:0]), "none"),
        (lambda: metrics.npmi(topics(), -counted(texts())), "negative"),
        (lambda: metrics.npmi(topics(), counted(texts()), window=5), "order"),
        (lambda: metrics.npmi(topics(), texts(), window=0), "window"),
        (lambda: metrics.inverted_rbo(topics(), p=1.0), "p:"),
        (lambda: metrics.split_tokens([[0.5]]), "whole counts"),
        (lambda: metrics.unigram_perplexity([[1, 0]], [[1, 0]]), "two tokens"),
        (lambda: metrics.collapse(topics(), [[1]]), "1 columns"),
        (lambda: metrics.npmi(np.eye(4, NUM_WORDS, dtype=int), counted(texts())), "a word twice"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: Any, named: str) -> None:
    with pytest.raises(DataError, match=named):
        call()
