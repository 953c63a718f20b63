"""What each stage holds on the device at its peak, as the program is written today.

Every formula names what it counts; the code that holds it is pruning/statistics.py (Gram matrices
of one layer at a time), pruning/elastic_layer.py (permuted copies of the input projections and the
corrections of every layer, kept from the calibration to the end of the refit), pruning/elastic.py
(a cache of cuts) and pruning/refit.py (streams of all calibration tokens).

Shapes: O output channels, N input channels of an output projection, k kept of them, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pruning.architecture import Architecture
from selfpruner.config import RunConfig, SpeedSettings
from selfpruner.costs.answering import driver_of
from selfpruner.costs.hardware import Precision
from selfpruner.costs.judging import LONGEST_ROW, reported_tokens
from selfpruner.costs.surgery import Shapes
from selfpruner.costs.work import BYTES, Running

CACHE_BYTES = 512 * 2**20  # pruning.elastic's


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, by what they hold.

    Attributes:
        weights: of the dense model.
        pruned: of sliced models.
        copies: input projections in rank order, of all layers.
        corrections: factors, products and weights that cuts are made from, of all layers.
        statistics: Gram matrices and what is made of them, one layer's unless calibration grows.
        streams: hidden states of all tokens of a stage.
        working: activations and logits of one micro-batch, cached cuts.
        driver: weights of an LLM that is another model or another process.
    """

    weights: float = 0.0
    pruned: float = 0.0
    copies: float = 0.0
    corrections: float = 0.0
    statistics: float = 0.0
    streams: float = 0.0
    working: float = 0.0
    driver: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        held = self.weights + self.pruned + self.copies + self.corrections
        return held + self.statistics + self.streams + self.working + self.driver


@dataclass(frozen=True)
class MemoryModel:
    """The peaks of all stages of one run.

    Attributes:
        config: of the run.
        dense, pruned: both models in the precision of the run.
        models: sliced models that are refitted side by side.
    """

    config: RunConfig
    dense: Running
    pruned: Running
    models: int

    def load(self) -> Memory:
        """Return the dense weights alone."""
        return self._placed(Memory(weights=self.dense.weight_bytes))

    def scratch(self) -> float:
        """Return what a streamed run keeps on disk: for curvature, cuts, slopes, sliced models."""
        return self.fisher + self.cuts + self.finished + self.slopes

    @property
    def cuts(self) -> float:
        """Bytes that the cuts of all plans are made from."""
        return self._elastic.copies + self._elastic.corrections

    @property
    def fisher_tokens(self) -> int:
        """Tokens by which the curvature is measured: whole sequences, one at least."""
        wanted, data = self.config.pruning.fisher_tokens, self.config.data
        sequences = min(max(1, wanted // data.length), data.calibrate.tokens // data.length)
        return sequences * data.length if wanted else 0

    @property
    def fisher(self) -> float:
        """Bytes of the inputs of all layers on the way back, and of the roots that it leaves."""
        layers = self._architecture.layers
        return layers * self._stream(self.fisher_tokens) + self._roots

    @property
    def finished(self) -> float:
        """Bytes of all sliced models of a streamed run, before and after the refit."""
        return self.models * (2 if self.config.pruning.refit else 1) * self.pruned.weight_bytes

    def curvature(self) -> Memory:
        """Return the peak on the way back: the inputs of all layers, all roots but one layer's.

        Beside them 512 rows of logits and of what comes back.
        """
        logits = 512 * self._architecture.vocabulary * (4 + 2 * BYTES[self.dense.precision])
        streams, working = self._way_back(self.fisher_tokens)
        roots = self._roots / (self._architecture.layers if self.is_streamed else 1)
        held = Memory(
            weights=self.dense.weight_bytes,
            statistics=roots,
            streams=streams,
            working=max(working, logits),
        )
        return self._placed(held)

    @property
    def slope_tokens(self) -> int:
        """Tokens on which the slopes of a plan are measured, 0 where none are."""
        data, search = self.config.data, self.config.search
        sequences = min(search.slopes, data.search.tokens // data.length)
        return sequences * data.length if self.config.measures_slopes else 0

    @property
    def slopes(self) -> float:
        """Bytes of the inputs of all layers where slopes are measured."""
        return self._architecture.layers * self._stream(self.slope_tokens)

    def _way_back(self, tokens: int) -> tuple[float, float]:
        """Return the streams and the working memory of a way up through all layers and back.

        Streams are the inputs of all layers, or of one where they go to disk, and gradients. What a
        layer keeps of one micro-batch for its way back is about three times its activations, and
        three matrices of attention scores in float32.
        """
        length, model = self.config.data.length, self._architecture
        rows = min(self.config.evaluation.batch_size, tokens // length)
        scores = 12 * rows * model.heads * length**2
        inputs = 1 if self.is_streamed else model.layers
        streams = (inputs + 2) * self._stream(tokens)
        return streams, 3 * self._activations(length) + scores if tokens else 0.0

    def calibrate(self) -> Memory:
        """Return the peak at the last layer: everything that is kept is there already.

        Streams are a layer's inputs and outputs of all calibration tokens. Statistics are the two
        Gram matrices in float32 and, for one block, a permuted one, its covariance and factor in
        float64 and the factor in float32 (24 N^2 bytes), with `obs` an inverse and its update too
        (40 N^2); where a ridge is chosen the moments of held-out tokens are apart (16 N^2 more).
        """
        settings, shapes = self.config.pruning, self._shapes
        metrics = (settings.attention_metric or settings.metric, settings.metric)
        apart = 16 if settings.ridge == "auto" else 0
        work = (
            ((40 if metric == "obs" else 24) + apart) * n * n + 8 * shapes.outputs * n
            for metric, n in zip(metrics, shapes.inputs, strict=True)
        )
        statistics = 4.0 * sum(n * n for n in shapes.inputs) + max(work)
        if settings.calibration == "auto":
            statistics += shapes.over_layers(lambda _, x: 8 * x * x)
        roots = self._roots / (self._architecture.layers if self.is_streamed else 1)
        tokens = self.config.data.calibrate.tokens
        held = replace(
            self._elastic,
            statistics=statistics + roots,
            streams=2 * self._stream(tokens),
            working=self._activations(self.config.data.length, float32=True),
        )
        return self._placed(held)

    def score(self) -> Memory:
        """Return the peak while plans are scored, or slopes measured.

        References of all search and selection tokens are there throughout. On their way back the
        losses of one sequence keep its logits twice, and once more in float32.
        """
        data, shapes = self.config.data, self._shapes
        cached = min(CACHE_BYTES, self.pruned.kept * self._output_bytes)
        k = round(self.pruned.kept * shapes.mlp)
        solve = 8.0 * shapes.outputs * k + 4.0 * k * k if self._corrects else 0.0
        references = 4.0 * (data.search.tokens + data.select.tokens) * shapes.outputs
        streams, back = self._way_back(self.slope_tokens)
        if self.slope_tokens:
            logits = data.length * self._architecture.vocabulary * len(self.config.text_terms)
            back = max(back, (4 + 2 * BYTES[self.dense.precision]) * logits)
        held = replace(
            self._ranked,
            streams=references + max(self._generation, streams),
            working=cached + solve + max(self._activations(data.length), back),
        )
        return self._placed(held)

    def search(self) -> Memory:
        """Return the peak of the search: of scoring, with the driver's weights."""
        driver = driver_of(self.config, self.dense)
        return replace(self.score(), driver=0.0 if driver is None else driver.weight_bytes)

    def refit(self) -> Memory:
        """Return the peak while all sliced models are refitted in one pass.

        Streams: the dense model's before, between and after its blocks, one for each pruned model,
        and what enters one projection. Statistics: moments fit, held out and merged in float32
        (12 k^2), and means, system and factor in float64 (32 k^2).
        """
        tokens, shapes = self.config.data.calibrate.tokens, self._shapes
        k = round(self.pruned.kept * shapes.mlp)
        width = BYTES[self.dense.precision]
        held = replace(
            self._ranked,
            pruned=self.models * self.pruned.weight_bytes,
            statistics=44.0 * k * k + 44.0 * shapes.outputs * k,
            streams=(3 + self.models + 1) * self._stream(tokens) + width * tokens * k,
            working=self._activations(self.config.data.length, float32=True),
        )
        return self._placed(held)

    def controls(self) -> Memory:
        """Return the peak while the controls are judged: nothing of the refit is freed yet."""
        held = replace(
            self._ranked,
            pruned=self.models * self.pruned.weight_bytes,
            streams=self._reported,
            working=self._judging,
        )
        return self._placed(held)

    def judge(self) -> Memory:
        """Return the peak of the dense and the exported model side by side."""
        held = Memory(
            weights=self.dense.weight_bytes,
            pruned=self.pruned.weight_bytes,
            streams=self._reported,
            working=self._judging,
        )
        return self._placed(held)

    def table(self) -> Memory:
        """Return the peak of the latency table: one model of its widths at the run's workload.

        What is timed shares weights; the dense model's cache is the largest.
        """
        load = self.config.workload
        prompt = 0 if load.phase == "decode" else load.tokens
        cached = load.batch * load.tokens if load.phase == "decode" else 0
        working = self._load(load.batch, prompt, cached)
        return self._placed(Memory(self.dense.weight_bytes, working=working))

    def timed(self, speed: SpeedSettings) -> Memory:
        """Return the peak of timing the dense and the exported model side by side."""
        cached = speed.batch * (speed.prompt_tokens + speed.new_tokens)
        working = self._load(speed.batch, speed.prompt_tokens, 2 * cached)
        return replace(self.judge(), working=working)

    def _load(self, batch: int, prompt: int, cached: int) -> float:
        """Return activations of a prefill, the last logits and the KV cache."""
        width, model = BYTES[self.dense.precision], self._architecture
        cache = width * cached * model.layers * model.kv_numbers(model.kv_heads)
        rows = batch / self.config.evaluation.batch_size
        return rows * self._activations(max(prompt, 1)) + width * batch * model.vocabulary + cache

    def spread(self, room: float, devices: int) -> Memory:
        """Return the peak of one device while the dense model alone is spread over all of them.

        `room`: bytes of weights that a device may hold.
        """
        weights = min(self.dense.weight_bytes / devices, room)
        return Memory(weights=weights, working=self._working(LONGEST_ROW))

    def export(self) -> Memory:
        """Return the peak of writing a model and reading it back beside itself."""
        both = 2 * self.pruned.weight_bytes
        return self._placed(Memory(weights=self.dense.weight_bytes, pruned=both))

    @property
    def caches_plans(self) -> bool:
        """Whether cuts are kept from plan to plan; else plans go through the layers together."""
        fit = self.pruned.kept * self._output_bytes <= CACHE_BYTES
        return not self.is_streamed and (fit or not self._corrects)

    @property
    def is_streamed(self) -> bool:
        """Whether one layer at a time is in memory."""
        return self.config.memory == "streamed"

    def _placed(self, held: Memory) -> Memory:
        """Return what of it is in memory: all, or what belongs to one layer of each model."""
        if not self.is_streamed:
            return held
        layers = self._architecture.layers
        return replace(
            held,
            weights=held.weights * _share(self.dense),
            pruned=held.pruned * _share(self.pruned),
            copies=held.copies / layers,
            corrections=held.corrections / layers,
        )

    @property
    def _generation(self) -> float:
        """Hidden states of plans that advance together, layer by layer."""
        data, search = self.config.data, self.config.search
        if self.caches_plans:
            return 0.0
        finalists = search.finalists + 1  # and the first plan
        window = search.window or data.search.tokens
        scored = min(window * data.length, data.search.tokens)
        brood = max(search.population, search.crossover + search.mutate)
        plans = max(brood * scored, finalists * data.select.tokens)
        return self._stream(plans)

    @property
    def _reported(self) -> float:
        """Hidden states of a reported text, all of it together in a streamed model."""
        tokens = [tokens for tokens, _ in reported_tokens(self.config.data)]
        return self._stream(max(tokens, default=0)) if self.is_streamed else 0.0

    @property
    def _architecture(self) -> Architecture:
        return self.dense.architecture

    @property
    def _shapes(self) -> Shapes:
        return Shapes.of(self._architecture)

    @property
    def _corrects(self) -> bool:
        return self.config.pruning.reconstruction == "least_squares"

    @property
    def _output_bytes(self) -> float:
        return self._shapes.over_layers(lambda o, n: BYTES[self.dense.precision] * o * n)

    @property
    def _roots(self) -> float:
        """Roots of the Fisher matrices of all layers, in float32."""
        return self._shapes.over_layers(lambda o, _: 4 * o * o) if self.fisher_tokens else 0.0

    @property
    def _elastic(self) -> Memory:
        """What the elastic model of all layers keeps beside the dense one."""
        # 4 N^2 for the factor or the moments, 4 O N for the weights, once more for their product.
        per_weight = 8 if self._corrects else 4
        corrections = self._shapes.over_layers(lambda o, n: 4 * n * n + per_weight * o * n)
        copies = self.dense.block_bytes - self._output_bytes
        return Memory(self.dense.weight_bytes, copies=copies, corrections=corrections)

    @property
    def _ranked(self) -> Memory:
        """What stays from the calibration to the end of the refit.

        A sequential ranking builds the elastic model too, for its cut errors, and lets it go; then
        it keeps the parameters of the last plan.
        """
        if self.config.pruning.statistics == "sequential":
            return Memory(self.dense.weight_bytes, copies=self.pruned.block_bytes)
        return self._elastic

    @property
    def _judging(self) -> float:
        """Activations and all logits of the longest reported rows."""
        length = max((x.length for x in self.config.data.report), default=self.config.data.length)
        return self._working(length)

    def _working(self, length: int) -> float:
        """Return activations and all logits of rows of `length`."""
        rows = self.config.evaluation.batch_size
        logits = BYTES[self.dense.precision] * rows * length * self._architecture.vocabulary
        return self._activations(length) + logits + 2.0**26

    def _stream(self, tokens: int) -> float:
        return float(BYTES[self.dense.precision] * tokens * self._architecture.hidden)

    def _activations(self, length: int, *, float32: bool = False) -> float:
        """Return the activations of one layer and micro-batch; `float32`: with two wide copies."""
        width, model = BYTES[self.dense.precision], self._architecture
        tokens = self.config.evaluation.batch_size * length
        inner = 3 * model.mlp + 4 * model.hidden + 2 * model.heads * model.head_dim
        return float(tokens * (width * inner + (8 * model.mlp if float32 else 0)))


def _share(model: Running) -> float:
    """Return the share of a model's weights that lies outside its layers or in one of them."""
    outer = model.weight_bytes - model.block_bytes
    return (outer + model.block_bytes / model.architecture.layers) / model.weight_bytes


def precision_of(dtype: str, *, fast_bfloat16: bool) -> Precision:
    """Return the precision of forward passes; float16 is as fast and as large as bfloat16."""
    if dtype == "float32" or (dtype == "auto" and not fast_bfloat16):
        return "float32"
    return "bfloat16"
