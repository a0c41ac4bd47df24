"""The interface of each kind of component. A plugin has the members of a protocol and inherits nothing.

Shapes (B images, C channels, stride = pixels per cell and side):

| value | dtype, shape | range |
| --- | --- | --- |
| images | float (B, 3, H, W); condition maps (B, C, H, W) | [-1, 1] |
| latents | float (B, D, h, w), h = H / stride, w = W / stride; (B, D, 1, N) without places in the image | |
| indices | int64, a quantizer's own shape: (B, h, w), with K codebooks (B, h, w, K), with scales (B, T) | [0, V_k) |
| tokens | int64 (B, T): the indices in the order of `vqf.tokens.layout.TokenLayout`; -1 where unknown | [0, V_k) |
| prefix | `vqf.tokens.prefix.Prefix`: M condition tokens, ids in a vocabulary of their own, or embeddings | |

The pipeline passes *wired* parameters of a constructor by name, if declared; all others are options of the config.

A *capability* is a protocol that a component may have beside that of its kind, such as `Updates` for a quantizer. It is
had by having its members.
"""

from vqf.protocols.data import (
    ConditionReader,
    Data,
    Labelled,
    LimitsUnreadable,
    Named,
    Split,
    StoredInShards,
    StreamingSplit,
    TracksReadErrors,
)
from vqf.protocols.evaluation import (
    Directed,
    EvaluationProtocol,
    FeatureNetwork,
    FeatureSet,
    HasIntervals,
    HasNetwork,
    Metric,
    Reconstruction,
    SetMetric,
    SetMetricResult,
    TokenMetric,
)
from vqf.protocols.prior import (
    Causal,
    Conditioner,
    Droppable,
    Embedded,
    HasSpeedOptions,
    ImageCodec,
    Masked,
    Positioned,
    Prepares,
    PreparesShifted,
    Prior,
    RaggedChunks,
    RaggedDecoding,
    ReadsField,
    ReadsImages,
    Renders,
    Sampler,
    ScoredSamples,
    Scorer,
    Windowed,
    WindowPrefix,
)
from vqf.protocols.runs import VALIDATION_PREFIX, ChecksStart, Distributed, Logger, Pipeline, to_steps
from vqf.protocols.tokenizer import (
    Adversary,
    Decoder,
    Discriminator,
    DiscriminatorOutput,
    Encoder,
    ExpectsLogits,
    Layered,
    LazyRegularizer,
    LimitedChannels,
    Loss,
    Pretrained,
    Quantized,
    Quantizer,
    Regularizer,
    TiledDecoding,
    TiledEncoding,
    Unplaced,
    Updates,
)

__all__ = [
    "VALIDATION_PREFIX",
    "Adversary",
    "Causal",
    "ChecksStart",
    "ConditionReader",
    "Conditioner",
    "Data",
    "Decoder",
    "Directed",
    "Discriminator",
    "DiscriminatorOutput",
    "Distributed",
    "Droppable",
    "Embedded",
    "Encoder",
    "EvaluationProtocol",
    "ExpectsLogits",
    "FeatureNetwork",
    "FeatureSet",
    "HasIntervals",
    "HasNetwork",
    "HasSpeedOptions",
    "ImageCodec",
    "Labelled",
    "Layered",
    "LazyRegularizer",
    "LimitedChannels",
    "LimitsUnreadable",
    "Logger",
    "Loss",
    "Masked",
    "Metric",
    "Named",
    "Pipeline",
    "Positioned",
    "Prepares",
    "PreparesShifted",
    "Pretrained",
    "Prior",
    "Quantized",
    "Quantizer",
    "RaggedChunks",
    "RaggedDecoding",
    "ReadsField",
    "ReadsImages",
    "Reconstruction",
    "Regularizer",
    "Renders",
    "Sampler",
    "ScoredSamples",
    "Scorer",
    "SetMetric",
    "SetMetricResult",
    "Split",
    "StoredInShards",
    "StreamingSplit",
    "TiledDecoding",
    "TiledEncoding",
    "TokenMetric",
    "TracksReadErrors",
    "Unplaced",
    "Updates",
    "WindowPrefix",
    "Windowed",
    "to_steps",
]
