"""CMA-ES over kept shares: the strategy's state is worked out from the ledger, never stored."""

from __future__ import annotations

import numpy as np

from agent.candidate import Candidate
from agent.projection import Floats
from agent.state import SearchContext

_SIGMA = 0.1  # of kept shares: a step of ten points
_SEED_STREAM = 6_151  # keeps the samples apart from the other draws of a search


def sampled_shares(context: SearchContext, generation: int, slot: int) -> Floats:
    """Return the kept shares (layers, 2) that the strategy samples for a slot, 0 to 1.

    Separable CMA-ES (Ros and Hansen, PPSN 2008): with some sixty shares and a few dozen
    evaluations there is no learning of a full covariance. It starts in generation 1 from the best
    plan of generation 0; a sample is told with the fitness of the plan that it was projected to,
    and one that had no plan of its own, such as one whose slot the LLM filled, counts as the worst.
    """
    from cmaes import SepCMA  # brings scipy.stats, a second that only a search by it shall wait

    settings = context.settings
    size, layers = max(2, settings.crossover + settings.mutate), context.space.layers
    best, candidates = context.ledger.best(1, before=1)[0], context.ledger.candidates()
    start = context.space.shares(context.grid.levels(best.plan))
    strategy = SepCMA(
        mean=start.flatten(),
        sigma=_SIGMA,
        bounds=np.tile([0.0, 1.0], (start.size, 1)),
        seed=int(np.random.default_rng((context.seed, _SEED_STREAM)).integers(2**31)),
        population_size=size,
    )
    for earlier in range(1, generation):
        made = {x.slot: x for x in candidates if x.generation == earlier and _is_sample(x)}
        asked = [strategy.ask() for _ in range(size)]
        strategy.tell([(x, _fitness(made, i)) for i, x in enumerate(asked)])
    sample: Floats = [strategy.ask() for _ in range(slot + 1)][slot]
    return sample.reshape(layers, 2)


def _is_sample(candidate: Candidate) -> bool:
    """Return whether the strategy made the plan, not the LLM of a hybrid search."""
    return candidate.origin in ("classical", "fallback")


def _fitness(made: dict[int, Candidate], slot: int) -> float:
    """Return the fitness of a slot's plan, the generation's worst where it had none."""
    if slot in made:
        return made[slot].fitness
    return max((x.fitness for x in made.values()), default=0.0)
