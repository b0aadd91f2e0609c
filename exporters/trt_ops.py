"""What the ONNX importer of TensorRT takes, as tables: operators, dtypes, limits and target profiles.

Taken from NVIDIA's operator list for TensorRT 11.1 and corrected where parsing and building with TensorRT for RTX
1.7 disagreed with it. An operator that is in no row is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MIN_OPSET, MAX_OPSET = 9, 24  # the importer enforces no upper end: newer graphs parse and may mean something else
MAX_RANK = 8
MAX_SUBGRAPH_DEPTH = 24
MAX_PROTO_BYTES = 2**31 - 1  # protobuf
TOPK_MAX_K = 3840
ATTENTION_MAX_HEAD_DIM = 256  # 320 and 512 find no kernel


@dataclass(frozen=True)
class Profile:
    """A target to lint for: the oldest importer that must take the graph."""

    name: str
    importer: tuple[int, int]  # as a TensorRT version
    max_opset: int = MAX_OPSET


PROFILES: Mapping[str, Profile] = {
    p.name: p
    for p in (
        Profile("rtx", (11, 4)),  # TensorRT for RTX 1.7 carries the importer of TensorRT 11.4
        Profile("trt", (10, 15)),  # the first with TensorScatter, RotaryEmbedding and RMSNormalization
    )
}


@dataclass(frozen=True)
class Op:
    """One operator: first importer that has it (None: none has), dtypes of its data, and what to do instead."""

    since: tuple[int, int] | None
    dtypes: frozenset[str]
    fix: str


_ALWAYS = (8, 0)  # older than every profile
_NAMES = {
    "f32": "FLOAT",
    "f16": "FLOAT16",
    "bf16": "BFLOAT16",
    "i32": "INT32",
    "i64": "INT64",
    "b": "BOOL",
    "i8": "INT8",
    "f8": "FLOAT8E4M3FN",
    "i4": "INT4",
    "f4": "FLOAT4E2M1",
}
_FLOAT = "f32 f16 bf16"
_NUMBER = "f32 f16 bf16 i32 i64"
_ANY = "f32 f16 bf16 i32 i64 b"
_CAST = "cast around the node"

# Operators of one row, first importer, dtypes, fix for a dtype (or for the operator, when no importer has it).
_ROWS: tuple[tuple[str, tuple[int, int] | None, str, str], ...] = (
    ("Abs Neg Sign", _ALWAYS, _NUMBER, _CAST),
    (
        "Exp Log Sqrt Sin Cos Tan Sinh Cosh Asin Acos Atan Asinh Acosh Atanh Floor Ceil Round Reciprocal Erf "
        "Sigmoid Tanh Softplus Softsign Elu Selu Celu LeakyRelu PRelu ThresholdedRelu HardSigmoid Shrink "
        "Softmax LogSoftmax Hardmax IsNaN IsInf Gelu MatMul Gemm Einsum Conv ConvTranspose "
        "LayerNormalization GroupNormalization InstanceNormalization BatchNormalization "
        "LpNormalization ReduceL2 ReduceLogSum ReduceLogSumExp Dropout Resize "
        "AveragePool MaxPool GlobalAveragePool GlobalMaxPool LpPool LSTM GRU RNN",
        _ALWAYS,
        _FLOAT,
        "cast to a float dtype before it",
    ),
    ("RMSNormalization RotaryEmbedding", (10, 15), _FLOAT, _CAST),
    ("Attention", (10, 14), "f16 bf16", "no float32 kernel: write MatMul, Softmax, MatMul"),
    ("TensorScatter", (10, 15), _FLOAT, "keep the cache in float16"),
    ("Swish", (11, 0), _FLOAT, "write Mul(x, Sigmoid(alpha x))"),
    ("Relu", _ALWAYS, "f32 f16 bf16 i64", "use Max(x, 0) for int32"),
    ("HardSwish Mish", _ALWAYS, "f32 f16", "decompose for bfloat16"),
    ("MeanVarianceNormalization", _ALWAYS, "f32", "decompose: its epsilon is float32"),
    ("Add Sub Mul Div Max Min Sum Mean Pow Mod Clip CumSum TopK ArgMax ArgMin", _ALWAYS, _NUMBER, _CAST),
    ("Greater Less GreaterOrEqual LessOrEqual DepthToSpace SpaceToDepth", _ALWAYS, _NUMBER, _CAST),
    ("ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceSumSquare", _ALWAYS, _NUMBER, _CAST),
    ("And Or Xor Not", _ALWAYS, "b", "cast to bool before it"),
    ("Equal Where Cast CastLike Gather GatherElements GatherND ScatterElements ScatterND", _ALWAYS, _ANY, _CAST),
    (
        "OneHot Trilu EyeLike Concat Split Slice Reshape Transpose Squeeze Unsqueeze Flatten Expand Tile Identity "
        "ReverseSequence Pad",
        _ALWAYS,
        _ANY,
        _CAST,
    ),
    ("Constant ConstantOfShape", _ALWAYS, _ANY + " i8 f8 i4 f4", "convert the constant"),
    ("Range", _ALWAYS, "f32 i32 i64", "fold it into a constant"),
    ("GridSample RoiAlign", _ALWAYS, "f32 f16", "cast to float16"),
    ("QuantizeLinear", _ALWAYS, _FLOAT, "quantize from a float dtype"),
    ("DequantizeLinear", _ALWAYS, "i8 f8 i4 f4", "re-quantize to int8, float8_e4m3fn or int4; keep biases in float"),
    ("Shape Size If Loop Scan", _ALWAYS, "", ""),  # no dtype of their own
    # Below: no importer, or one that is of no use to a graph of fixed shapes.
    ("BitwiseAnd BitwiseOr BitwiseXor BitwiseNot BitShift", None, "", "use bool operators or arithmetic"),
    ("NonZero Compress Unique NonMaxSuppression", None, "", "use TopK with a constant K, or Where with a mask"),
    (
        "DynamicQuantizeLinear MatMulInteger ConvInteger QLinearMatMul QLinearConv",
        None,
        "",
        "use QuantizeLinear, DequantizeLinear and the float operator",
    ),
    (
        "RandomNormal RandomUniform RandomNormalLike RandomUniformLike Bernoulli Multinomial",
        None,
        "",
        "make the noise a graph input: seeds are ignored",
    ),
    (
        "SequenceConstruct SequenceAt SequenceInsert SequenceEmpty SequenceErase SequenceLength SequenceMap "
        "SplitToSequence ConcatFromSequence Optional OptionalGetElement OptionalHasElement",
        None,
        "",
        "use Split, Concat and Identity",
    ),
    (
        "StringConcat StringSplit StringNormalizer RegexFullMatch TfIdfVectorizer ImageDecoder MelWeightMatrix",
        None,
        "",
        "do it in the processor, before the graph",
    ),
    ("FlexAttention SwiGLU LinearAttention CausalConvWithState BitCast CumProd", None, "", "decompose it"),
    ("Scatter", None, "", "use ScatterElements"),
    ("Upsample", None, "", "use Resize"),
)


OPS: Mapping[str, Op] = {
    name: Op(since, frozenset(_NAMES[t] for t in dtypes.split()), fix)
    for names, since, dtypes, fix in _ROWS
    for name in names.split()
}


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


QUANTIZED = _set("INT8 FLOAT8E4M3FN INT4 FLOAT4E2M1")
DATA_DEPENDENT = _set("NonZero Compress Unique NonMaxSuppression")
MOVES_DATA = _set("Reshape Transpose Squeeze Unsqueeze Flatten Concat Split Slice Expand Tile Identity Gather Pad")
SAME_DTYPE: Mapping[str, tuple[int, ...] | None] = {  # inputs that must agree; None: all of them
    **dict.fromkeys(_set("Add Sub Mul Div Max Min Sum Mean Mod Equal Greater Less GreaterOrEqual LessOrEqual")),
    **dict.fromkeys(_set("MatMul Gemm Einsum Concat Clip PRelu Range")),
    "Where": (1, 2),
}
OPERANDS_LIKE_X: Mapping[str, tuple[int, ...]] = {  # scales, biases and tables that must have the dtype of input 0
    "LayerNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "BatchNormalization": (1, 2, 3, 4),
    "RotaryEmbedding": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "TensorScatter": (1,),
}
DATA_OPERAND: Mapping[str, int] = {"Where": 1, "OneHot": 2}  # whose dtype counts, when it is not input 0
TYPED_BY_OUTPUT = _set("Constant ConstantOfShape EyeLike")
SHAPE_OPERANDS: Mapping[str, tuple[int, ...]] = {  # inputs that fix shapes and so must be constant
    "Reshape": (1,),
    "Expand": (1,),
    "Tile": (1,),
    "Slice": (1, 2, 3, 4),
    "Pad": (1, 3),
    "Resize": (1, 2, 3),
    "Range": (0, 1, 2),
    "ConstantOfShape": (0,),
    "OneHot": (1,),
    "TopK": (1,),
    "CumSum": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "Split": (1,),
    "Trilu": (1,),
    **dict.fromkeys((n for n in OPS if n.startswith("Reduce")), (1,)),
}
ONE_OUTPUT = _set("LayerNormalization Dropout MaxPool BatchNormalization RMSNormalization")
NO_INITIALIZER = _set(
    "INT16 UINT16 UINT32 UINT64 STRING FLOAT8E5M2 FLOAT8E5M2FNUZ FLOAT8E4M3FNUZ UINT4 UINT2 INT2 COMPLEX64 COMPLEX128"
)
NO_TENSOR = _set("DOUBLE INT16 UINT16 UINT32 UINT64")
