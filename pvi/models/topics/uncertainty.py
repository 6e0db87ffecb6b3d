"""What is known of latent topics: draws, intervals, and which words are surely among the top."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pvi.errors import DataError, ModelError
from pvi.models.topics.inference import evaluating
from pvi.models.topics.programs import TopicPrograms

BLOCK = 2**26  # numbers in the draws that are made at once


def topic_draws(programs: TopicPrograms, num_draws: int, seed: int) -> Iterator[Tensor]:
    """Draws of $p(w \\mid k)$ from the topics' posterior, some `(S, K, V)` at a time.

    Raises:
        ModelError: topics are no latents.
        DataError: no draw is asked for.
    """
    if num_draws < 1:
        raise DataError(f"num_draws: expected at least 1, got {num_draws}")
    if not programs.bayesian:
        raise ModelError(
            "these topics are estimates without a posterior; fit with bayesian_topics=True"
        )
    decoder = programs.decoder
    size = max(1, BLOCK // decoder.components(programs.point()).numel())
    generator = torch.Generator().manual_seed(seed)
    with evaluating(programs):
        q = programs.topics.posterior().base_dist
        for start in range(0, num_draws, size):
            shape = (min(size, num_draws - start), *q.loc.shape)
            white = torch.randn(shape, generator=generator, dtype=q.loc.dtype)
            yield decoder.components(q.loc + white * q.scale)


def credible_intervals(
    programs: TopicPrograms, level: float, num_draws: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Lower and upper ends of central intervals of $p(w \\mid k)$, `(K, V)` each."""
    if not 0 < level < 1:
        raise DataError(f"level: expected a probability between 0 and 1, such as 0.9, got {level}")
    draws = torch.cat(list(topic_draws(programs, num_draws, seed)))
    ordered, tail = draws.sort(0).values, 0.5 * (1.0 - level)
    places = [tail * (num_draws - 1), (1.0 - tail) * (num_draws - 1)]
    return ordered[round(places[0])], ordered[round(places[1])]


def top_word_probability(programs: TopicPrograms, n: int, num_draws: int, seed: int) -> Tensor:
    """$P(w$ among the n most probable words of topic $k)$ `(K, V)`."""
    counts = []
    for draws in topic_draws(programs, num_draws, seed):
        if not 1 <= n <= draws.shape[-1]:
            raise DataError(f"n: expected 1 to {draws.shape[-1]}, a topic's words, got {n}")
        top = draws.topk(n, -1).indices
        counts.append(torch.zeros_like(draws).scatter(-1, top, 1.0).sum(0))
    return torch.stack(counts).sum(0) / num_draws
