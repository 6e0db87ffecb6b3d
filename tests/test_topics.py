"""Topic models as estimators: recovery, invariance, memory, and scikit-learn's conventions."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix, save_npz, vstack
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import estimator_checks_generator

import pvi
from pvi.errors import CheckpointError, DataError, ModelError
from pvi.models.topics import (
    CTM,
    ETM,
    LDA,
    CountStream,
    DynamicETM,
    ProdLDA,
    SupervisedLDA,
    TopicModel,
)

K, V, N = 4, 60, 240


def planted(number: int = N, length: int = 80, seed: int = 0) -> tuple[Any, ...]:
    """Topics, shares and documents drawn from them."""
    rng = np.random.default_rng(seed)
    topics, shares = rng.dirichlet(np.full(V, 0.1), K), rng.dirichlet(np.full(K, 0.2), number)
    counts = np.stack([rng.multinomial(length, t @ topics) for t in shares])
    return topics, shares, csr_matrix(counts.astype(float))


TOPICS, SHARES, X = planted()
LABELS = np.array(list("abcd"))[SHARES.argmax(1)]
TIMES = 2000 + np.arange(N) % 3
EMBEDDINGS = np.random.default_rng(1).standard_normal((N, 5))
SHORT = {"epochs": 2, "batch_size": 80, "random_state": 0}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "LDA": (LDA(K, **SHORT), {}),
    "ProdLDA": (ProdLDA(K, bayesian_topics=True, **SHORT), {}),
    "ETM": (ETM(K, word_embeddings=6, **SHORT), {}),
    "CTM": (CTM(K, **SHORT), {"embeddings": EMBEDDINGS}),
    "zero-shot": (CTM(K, encoder="embeddings", **SHORT), {"embeddings": EMBEDDINGS}),
    "SupervisedLDA": (SupervisedLDA(K, **SHORT), {}),
    "DynamicETM": (DynamicETM(K, word_embeddings=6, **SHORT), {"times": TIMES}),
    "SAGE": (
        TopicModel(K, family="correlated", decoder="sage", **SHORT),
        {"covariates": EMBEDDINGS},
    ),
    "ECRTM": (TopicModel(K, family="weibull", decoder="ecrtm", word_embeddings=6, **SHORT), {}),
}


@pytest.fixture(scope="module")
def fitted() -> dict[str, Any]:
    labels = {"SupervisedLDA": LABELS}
    return {
        name: clone(model).fit(X, labels.get(name), progress=False, **more)
        for name, (model, more) in CASES.items()
    }


def some(more: dict[str, Any], rows: Any) -> dict[str, Any]:
    return {name: value[rows] for name, value in more.items()}


def matched(found: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of the best assignment, and for each found topic the true one."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (found, truth)]
    cosines = unit[0] @ unit[1].T
    rows, columns = linear_sum_assignment(-cosines)
    return cosines[rows, columns], columns


def test_planted_topics_are_found_and_their_intervals_cover() -> None:
    """Every topic to a cosine of .95; intervals of words that are not rare cover at their level.

    Coverage is within three standard errors of the level, as of independent intervals. Rare words
    have truths far below what any document could tell.
    """
    topics, _, counts = planted(600, 100)
    model = LDA(
        K,
        bayesian_topics=True,
        concentration=0.2,
        epochs=30,
        batch_size=100,
        lr=0.03,
        random_state=0,
    )
    model.fit(counts, progress=False)
    cosines, order = matched(model.components_, topics)
    assert cosines.min() > 0.95
    truth = topics[order]
    known = truth > 1 / (5 * V)
    for level in (0.5, 0.8, 0.9):
        low, high = model.credible_intervals(level, num_draws=500)
        covered = ((low <= truth) & (truth <= high))[known].mean()
        se = (level * (1 - level) / known.sum()) ** 0.5
        assert abs(covered - level) < 3 * se, f"{level}: {covered:.2f}"
    chance = model.top_word_probability(5)
    assert np.allclose(chance.sum(1), 5.0)
    top = np.argsort(-truth, 1)[:, :1]
    assert (np.take_along_axis(chance, top, 1) > 0.5).all()


@pytest.mark.slow
def test_intervals_are_too_narrow_where_topics_overlap() -> None:
    """As the documentation says: 90 % intervals of such topics held 77 % of the truths."""
    rng = np.random.default_rng(0)
    topics = np.exp(rng.normal(0.0, 0.3**-0.5, (K, V)))
    topics /= topics.sum(1, keepdims=True)
    shares = rng.dirichlet(np.full(K, 0.2), 600)
    counts = csr_matrix(np.stack([rng.multinomial(200, t @ topics) for t in shares]).astype(float))
    options = {"concentration": 0.2, "topic_concentration": 0.3, "lr": 0.03, "batch_size": 100}
    model = LDA(K, bayesian_topics=True, epochs=60, random_state=0, **options)
    model.fit(counts, progress=False)
    truth = topics[matched(model.components_, topics)[1]]
    low, high = model.credible_intervals(0.9, num_draws=1000)
    covered = ((low <= truth) & (truth <= high)).mean()
    assert abs(covered - 0.77) < 3 * (0.77 * 0.23 / truth.size) ** 0.5


@pytest.mark.parametrize("name", CASES)
def test_a_documents_topics_do_not_depend_on_its_batch(name: str, fitted: Any) -> None:
    model, more = fitted[name], CASES[name][1]
    shares = model.transform(X, **more)
    assert shares.shape == (N, K)
    assert np.allclose(shares.sum(1), 1.0, atol=1e-5)
    assert np.array_equal(model.transform(X, **more), shares)
    order = np.random.default_rng(0).permutation(N)
    assert np.abs(model.transform(X[order], **some(more, order)) - shares[order]).max() < 1e-6
    for size in (1, 7):
        rows = np.arange(size)
        assert np.abs(model.transform(X[rows], **some(more, rows)) - shares[rows]).max() < 1e-6
    assert np.isfinite(model.score_samples(X, **more)).all()
    assert np.allclose(model.components_.sum(1), 1.0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_answers_the_same(name: str, fitted: Any, tmp_path: Path) -> None:
    model, more = fitted[name], CASES[name][1]
    model.save(tmp_path / "model")
    again = type(model).load(tmp_path / "model")
    assert np.array_equal(again.transform(X, **more), model.transform(X, **more))
    assert again.get_params() == model.get_params()
    if name == "SupervisedLDA":
        assert np.array_equal(again.predict(X), model.predict(X))
    if name == "LDA":
        with pytest.raises(CheckpointError, match="holds a LDA, no ProdLDA"):
            ProdLDA.load(tmp_path / "model")


def test_dates_are_saved(tmp_path: Path) -> None:
    dates = (TIMES - 1970).astype("datetime64[Y]")
    model = DynamicETM(K, word_embeddings=6, **SHORT).fit(X, times=dates, progress=False)
    model.save(tmp_path / "model")
    again = DynamicETM.load(tmp_path / "model")
    assert again.times_.dtype == dates.dtype
    assert np.array_equal(again.transform(X, times=dates), model.transform(X, times=dates))


@pytest.mark.parametrize(("number", "steps"), [(30, 1), (300, 5), (1100, 5)])
def test_few_documents_are_enough_steps(number: int, steps: int) -> None:
    """An epoch of a small corpus has five steps, unless they would have fewer than 20 documents."""
    counts = planted(number)[2]
    model = LDA(2, epochs=2, random_state=0).fit(counts, progress=False)
    assert len(model.fit_.history) == 2 * steps


def test_empty_documents_and_strange_vocabularies(fitted: Any) -> None:
    for name in ("LDA", "ProdLDA", "ETM"):
        model = fitted[name]
        empty = model.transform(csr_matrix((2, V)))
        assert np.abs(empty - 1 / K).max() < 0.02  # the prior's mean, by 64 points
        assert model.score_samples(csr_matrix((2, V))).tolist() == [0.0, 0.0]
        with pytest.raises(ValueError, match=f"expecting {V} features"):
            model.transform(csr_matrix((2, V + 1)))
    holes = X.copy()
    holes.data[holes.indices == 3] = 0.0
    holed = vstack([holes, csr_matrix((1, V))]).tocsr()
    assert LDA(K, **SHORT).fit(holed, progress=False).transform(X).shape == (N, K)


def test_labels_of_empty_documents_say_nothing(fitted: Any) -> None:
    """Their z has no KL, so a label would pull it for nothing."""
    model = fitted["SupervisedLDA"]
    empty, labels = csr_matrix((4, V)), list("abcd")
    assert model.score_samples(empty, labels).tolist() == [0.0] * 4
    (batch,) = model.batches(empty, labels)
    assert pvi.TraceMeanFieldELBO().bound(model.model, model.guide, **batch) == 0.0


def test_labels_are_predicted_and_unknown_ones_are_left_out() -> None:
    some_known = np.where(np.arange(N) % 4 == 0, None, LABELS)
    model = SupervisedLDA(K, epochs=25, batch_size=60, lr=0.02, random_state=0)
    model.fit(X, some_known, progress=False)
    hidden = np.arange(N) % 4 == 0
    assert (model.predict(X)[hidden] == LABELS[hidden]).mean() > 0.6  # 0.25 by chance
    assert model.classes_.tolist() == list("abcd")
    assert np.allclose(model.predict_proba(X).sum(1), 1.0)
    with pytest.raises(DataError, match="label 'z', which fit did not see"):
        model.score(X, np.full(N, "z"))
    assert not hasattr(LDA(), "predict")


@pytest.mark.parametrize("unknown", [None, -1, np.nan, ""])
def test_an_unknown_label_is_no_class(unknown: Any) -> None:
    labels = LABELS.astype(object)
    labels[:5] = unknown
    y = labels.astype(str) if unknown == "" else labels
    model = SupervisedLDA(K, **SHORT).fit(X, y, progress=False)
    assert model.classes_.tolist() == list("abcd")
    coded = model.batches(X, y, size=N)[0]["labels"]
    assert (coded[:5] == -1).all() and (coded[5:] >= 0).all()


def test_covariates_shift_shares() -> None:
    """A planted effect is found with its sign, surely; `transform` then needs the covariates."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 2, (N, 1)).astype(float)
    logits = rng.standard_normal((N, K)) + 2.0 * (2 * group - 1) * np.array([1.0, -1.0, 0, 0])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    counts = csr_matrix(np.stack([rng.multinomial(80, t @ TOPICS) for t in shares]).astype(float))
    model = TopicModel(K, epochs=25, batch_size=60, lr=0.02, random_state=0)
    model.fit(counts, covariates=group, progress=False)
    _, order = matched(model.components_, TOPICS)
    effects = model.programs_.effects
    q = effects.posterior().base_dist
    loc, scale = (x.detach().numpy()[0] for x in (q.loc, q.scale))
    gap = loc[order == 0] - loc[order == 1]
    assert gap[0] > 3 * np.hypot(scale[order == 0], scale[order == 1])[0]
    with pytest.raises(DataError, match="fitted with 1 covariates"):
        model.transform(counts)


def test_topics_over_time_have_a_row_for_each_time(fitted: Any) -> None:
    model = fitted["DynamicETM"]
    assert model.topics_over_time_.shape == (3, K, V)
    assert np.allclose(model.topics_over_time_.mean(0), model.components_, atol=1e-6)
    assert model.times_.tolist() == [2000, 2001, 2002]
    with pytest.raises(DataError, match="1999"):
        model.transform(X, times=np.full(N, 1999))
    with pytest.raises(DataError, match="needs times="):
        model.transform(X)


def test_topics_follow_words_through_time() -> None:
    """Two topics keep four words each, and change two others for two new ones."""
    rng = np.random.default_rng(0)
    late, group = np.arange(N) % 2, np.arange(N) % 4 // 2
    counts = np.zeros((N, 16))
    for d in range(N):
        kept, moving = 8 * group[d], 8 * group[d] + 4 + 2 * late[d]
        counts[d, kept : kept + 4] = rng.poisson(5.0, 4)
        counts[d, moving : moving + 2] = rng.poisson(10.0, 2)
    options = {"step": 1.0, "epochs": 40, "batch_size": 60, "lr": 0.03, "random_state": 0}
    model = DynamicETM(2, word_embeddings=6, **options)
    model.fit(csr_matrix(counts), times=late, progress=False)
    mass = model.topics_over_time_.reshape(2, 2, 2, 8)  # time, topic, group, words of the group
    for topic in range(2):
        early, after = mass[:, topic, mass[0, topic].sum(-1).argmax()]
        assert early[4:6].sum() > 5 * early[6:].sum()
        assert after[6:].sum() > 5 * after[4:6].sum()


def test_parts_of_a_corpus_one_after_the_other() -> None:
    """`partial_fit` goes on from where it was, and scales to the whole corpus."""
    model = LDA(K, concentration=0.2, batch_size=40, lr=0.05, random_state=0, total_documents=N)
    scores = []
    for _ in range(4):
        for start in range(0, N, 80):
            model.partial_fit(X[start : start + 80], progress=False)
        scores.append(model.score(X))
    assert all(later > sooner for sooner, later in pairwise(scores))
    per_document = float(model.fit_.history["bound"][-1]) / N
    assert abs(per_document - scores[-1]) < 0.1 * abs(per_document)


def test_calls_of_partial_fit_have_noise_of_their_own() -> None:
    """With one noise in all calls, scales of latent topics would be learned against one draw."""
    seeds = []
    model = LDA(K, bayesian_topics=True, total_documents=N, random_state=0)
    step = model.partial_fit(X[:40])._recipe().step
    with pytest.MonkeyPatch.context() as patch:
        kept = lambda self, *given: seeds.append(given[4]) or step(*given)  # noqa: E731
        patch.setattr(type(model._recipe()), "step", kept)
        model.partial_fit(X[40:80]).partial_fit(X[80:120])
    assert len(set(seeds)) == 2


def test_streams_are_read_piece_by_piece() -> None:
    def read() -> Any:
        return (X[start : start + 100] for start in range(0, N, 100))

    stream = CountStream(read, n_documents=N, n_features=V, batch_size=40)
    model = LDA(K, concentration=0.2, epochs=30, lr=0.05, random_state=0)
    model.fit(stream, progress=False)
    assert matched(model.components_, TOPICS)[0].min() > 0.9
    with pytest.raises(DataError, match="a piece has 60 words, the stream says 61"):
        LDA(K, **SHORT).fit(CountStream(read, n_documents=N, n_features=V + 1))
    with pytest.raises(DataError, match=r"n_documents is 300, but read\(\) gave 240"):
        LDA(K, **SHORT).fit(CountStream(read, n_documents=300, n_features=V), progress=False)


def test_a_stream_begins_at_more_than_its_first_piece() -> None:
    stream = CountStream(
        lambda: (X[i : i + 10] for i in range(0, N, 10)), n_documents=N, n_features=V
    )
    assert (stream.first(25).matrix != X[:30]).nnz == 0
    assert len(stream.first(5000)) == N
    pandas = pytest.importorskip("pandas")
    names = [f"w{i}" for i in range(V)]
    model = LDA(K, **SHORT).fit(pandas.DataFrame(X.toarray(), columns=names), progress=False)
    assert model.fit(stream, progress=False).top_words(1)[0][0] in range(V)  # names are forgotten


LARGE = """
import resource, sys
import numpy as np
from scipy.sparse import csr_matrix
from pvi.models.topics import {kind}
V, N = 50_000, 6_000
rng = np.random.default_rng(0)
words = rng.integers(0, V, N * 20)
X = csr_matrix((np.ones(N * 20), words, np.arange(0, N * 20 + 1, 20)), (N, V))
X.sum_duplicates()
{kind}(2, batch_size=50, random_state=0).fit(X[:100], steps=1, progress=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = {kind}(2, batch_size=50, random_state=0).fit(X, steps=2, progress=False)
shares = model.transform(X)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024)
"""


@pytest.mark.parametrize("kind", [pytest.param("LDA", marks=pytest.mark.slow), "ProdLDA"])
def test_no_more_than_a_batch_is_dense(kind: str) -> None:
    """6,000 x 50,000 counts are 1,144 MB as float32; less than a quarter of that is used.

    A batch of 50 is 10 MB, of which a step holds a dozen: counts, logits, their gradients.
    """
    code = LARGE.format(kind=kind)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 280


AGAIN = """
import sys
import numpy as np
from scipy.sparse import load_npz
from pvi.models.topics import ProdLDA
folder = sys.argv[1]
shares = ProdLDA.load(f"{folder}/model").transform(load_npz(f"{folder}/x.npz"))
np.save(f"{folder}/shares.npy", shares)
"""


def test_a_new_process_gives_the_same(fitted: Any, tmp_path: Path) -> None:
    model = fitted["ProdLDA"]
    model.save(tmp_path / "model")
    save_npz(tmp_path / "x.npz", X)
    command = [sys.executable, "-c", AGAIN, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert np.abs(np.load(tmp_path / "shares.npy") - model.transform(X)).max() < 1e-6


def test_scores_are_bounds_on_the_evidence(fitted: Any) -> None:
    """The mean bound is below the evidence by importance sampling, and below it by not much."""
    for name in ("LDA", "ETM"):
        model = fitted[name]
        batch = model.batches(X[:40])[0]
        evidence = pvi.evidence(
            model.model, model.guide, num_samples=200, seed=0, progress=False, **batch
        )
        bound = model.score_samples(X[:40], num_samples=100)
        gap = evidence.log_evidence.numpy() - bound
        assert gap.mean() > 0
        assert gap.mean() < 20.0


def test_perplexity_is_of_the_other_half(fitted: Any) -> None:
    from pvi.models.topics.metrics import dc_perplexity, mixture_log_likelihood, split_tokens

    model = fitted["LDA"]
    first, second = split_tokens(X, 0)
    by_hand = mixture_log_likelihood(model.transform(first), model.components_, second).sum()
    assert np.isclose(model.perplexity(X), np.exp(-by_hand / second.sum()), rtol=1e-5)
    assert np.isclose(model.perplexity(X), dc_perplexity(model, X), rtol=1e-6)
    with pytest.raises(DataError, match="two tokens"):
        model.perplexity(csr_matrix(np.eye(V)))


def test_top_words_and_names(fitted: Any) -> None:
    model = fitted["LDA"]
    names = np.array([f"w{i}" for i in range(V)])
    words = model.top_words(3, vocabulary=names)
    assert words[0] == names[np.argsort(-model.components_[0])[:3]].tolist()
    assert model.get_feature_names_out().tolist() == ["lda0", "lda1", "lda2", "lda3"]
    with pytest.raises(DataError, match="vocabulary has 2 words"):
        model.top_words(3, vocabulary=["a", "b"])


def test_a_pipeline_from_texts() -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.pipeline import make_pipeline

    texts = ["the cat sat", "a dog ran far", "cat and dog", "", "far away it ran"] * 8
    line = make_pipeline(CountVectorizer(), LDA(2, epochs=2, random_state=0))
    shares = line.fit_transform(texts)
    assert shares.shape == (40, 2)
    assert np.abs(line.transform(["unheard-of words"]) - 0.5).max() < 1e-6


def test_the_export_is_computed_when_it_is_read(
    fitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pvi.models.topics.inference import Inference

    model, calls = fitted["ProdLDA"], []
    draws = Inference.draws
    monkeypatch.setattr(Inference, "draws", lambda *a: calls.append(1) or draws(*a))
    tree = model.to_datatree(X, num_draws=4, top_n=3)
    assert calls == []
    shares = tree["posterior"]["doc_topic"]
    assert shares.dims == ("chain", "draw", "document", "topic")
    part = shares.isel(document=[7, 2]).values
    assert len(calls) == 1
    assert np.array_equal(part, shares.values[:, :, [7, 2]])
    assert np.allclose(part.sum(-1), 1.0, atol=1e-5)
    words = tree["posterior"]["topic_word"]
    assert words.sizes["word"] >= 3
    assert words.std("draw").max() > 0  # topics are latent
    found = tree["log_likelihood"]["words"]
    bound = model.score_samples(X)
    assert found.mean("draw").values[0].mean() > bound.mean()
    again, other = (model.to_datatree(X, num_draws=4, seed=s) for s in (0, 1))
    for group, name in (("posterior", "doc_topic"), ("log_likelihood", "words")):
        assert np.array_equal(again[group][name], tree[group][name])
        assert np.isclose(other[group][name], tree[group][name]).mean() < 0.1
    assert model.to_arviz(X, num_draws=2).posterior["doc_topic"].shape == (1, 2, N, K)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(NotFittedError):
        LDA().transform(X)
    with pytest.raises(ModelError, match="family must be one of"):
        TopicModel(K, family="normal").fit(X)
    with pytest.raises(ModelError, match="encoder='coordinate' is for"):
        TopicModel(K, encoder="coordinate").fit(X)
    with pytest.raises(ModelError, match="normal prior, which Dirichlet has not"):
        LDA(K).fit(X, covariates=EMBEDDINGS)
    with pytest.raises(DataError, match="needs embeddings="):
        CTM(K).fit(X)
    with pytest.raises(DataError, match="needs y"):
        SupervisedLDA(K).fit(X)
    with pytest.raises(DataError, match=r"embeddings\[3\] is not finite"):
        bad = EMBEDDINGS.copy()
        bad[3] = np.nan
        CTM(K).fit(X, embeddings=bad)
    with pytest.raises(ModelError, match="bayesian_topics=True"):
        LDA(K, **SHORT).fit(X[:80], progress=False).credible_intervals()
    with pytest.raises(ValueError, match="Negative values"):
        LDA(K).fit(-X)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_components": 0}, "n_components must be a whole number from 1, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"concentration": 0.0}, "concentration must be a number above 0"),
        ({"topic_concentration": -1.0}, "topic_concentration must be a number above 0"),
        ({"lr": "fast"}, "lr must be a number above 0, got 'fast'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"hidden": ()}, "hidden must be one or more whole numbers"),
        ({"hidden": 10}, "hidden must be one or more whole numbers"),
        ({"label_weight": -1.0}, "label_weight must be at least 0"),
        ({"word_embeddings": 0}, "word_embeddings must be a matrix"),
    ],
)
def test_options_that_make_no_model(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        TopicModel(**options).fit(X)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: LDA(K).fit(["some text", "more"]), "got texts"),
        (lambda: LDA(K).fit(np.array(["some text", "more"])), "got texts"),
        (lambda: LDA(K).top_words(), "not fitted"),
        (lambda: DynamicETM(K).fit(X, times=TIMES.astype(str)), "numbers or numpy's dates"),
        (lambda: LDA(K, total_documents=-5).partial_fit(X), "total_documents must be None or"),
        (lambda: SupervisedLDA(K).predict(X), "not fitted"),
        (lambda: SupervisedLDA(K).fit(X, ["a"] * N), "two classes or more, got 1"),
        (lambda: SupervisedLDA(K).fit(X, [None] * N), "two classes or more, got 0"),
        (lambda: SupervisedLDA(K).fit(X, SHARES[:, 0]), "continuous"),
        (lambda: DynamicETM(K).fit(X, times=np.where(TIMES == 2001, np.nan, 1.0)), r"times\[1\]"),
    ],
)
def test_data_that_are_none(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda model: model.top_words(0), "n: expected at least 1"),
        (lambda model: model.top_words(vocabulary={"a": 0}), "in order, .* got a dict"),
        (lambda model: model.to_datatree(X, top_n=0), "top_n"),
        (lambda model: model.score_samples(X, num_samples=0), "num_samples"),
        (lambda model: model.to_datatree(X, num_draws=0), "num_draws"),
        (lambda model: model.to_datatree(X, importance=0), "importance"),
        (lambda model: model.credible_intervals(90), "level: expected a probability"),
        (lambda model: model.credible_intervals(num_draws=0), "num_draws"),
        (lambda model: model.topic_draws(0), "num_draws"),
        (lambda model: model.top_word_probability(0), "n: expected 1 to 60"),
        (lambda model: model.top_word_probability(V + 1), "n: expected 1 to 60"),
    ],
)
def test_what_no_model_answers(fitted: Any, call: Any, named: str) -> None:
    with pytest.raises(DataError, match=named):
        call(fitted["ProdLDA"])


def test_what_is_trained_is_repeatable_and_leaves_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    one, two = (ProdLDA(K, **SHORT).fit(X, progress=False) for _ in range(2))
    assert np.array_equal(one.components_, two.components_)
    assert torch.equal(torch.get_rng_state(), state)
    other = ProdLDA(K, **{**SHORT, "random_state": 1}).fit(X, progress=False)
    assert not np.array_equal(one.components_, other.components_)


CHECKED = (
    TopicModel(2, family="dirichlet", encoder="coordinate", epochs=1, random_state=0),
    ProdLDA(2, epochs=1, random_state=0),
    ETM(2, word_embeddings=4, epochs=1, random_state=0),
    SupervisedLDA(2, epochs=1, random_state=0),
)
CHECKS = [
    pytest.param(
        model,
        check,
        id=f"{type(model).__name__}-{check.func.__name__}",
        marks=[pytest.mark.slow] if number > 1 else [],
    )
    for number, model in enumerate(CHECKED)
    for _, check in estimator_checks_generator(model)
]


@pytest.mark.parametrize(("model", "check"), CHECKS)
def test_conventions_of_scikit_learn(model: Any, check: Any) -> None:
    check(clone(model))
