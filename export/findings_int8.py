"""Checks of quantized files: why integers do not make them fast."""

from collections.abc import Iterator

from export.finding import Case, Finding, named

DOMINATES = 0.30
"""From this share of the time on one kind of operator is worth a finding of its own."""

ACTIVATIONS = frozenset(
    {"Clip", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "LeakyRelu", "PRelu", "Elu", "Selu", "Gelu", "Erf"}
    | {"FastGelu", "BiasGelu", "QuickGelu", "Softplus", "Mish", "Swish"}
)
"""Activation functions that integer convolutions cannot take in."""


def unfused(case: Case) -> Iterator[Finding]:
    """Quantized layers that run in float between quantizers."""
    facts, operators = case.candidate, case.candidate.operators
    quantized = {layer.layer for layer in facts.layers if layer.quantized}
    left = [layer for layer in operators.float_layers if layer in quantized]
    if facts.quantization != "static" or not left:
        return
    counts = operators.histogram.optimised
    quantizers = counts.get("QuantizeLinear", 0) + counts.get("DequantizeLinear", 0)
    total = len(operators.integer_layers) + len(operators.float_layers)
    yield Finding(
        code="unfused_quantizers",
        title="Quantized layers run in float",
        evidence=f"{few_integer_layers(facts.name, operators.integer_share)} That is {len(left)} of {total} layers, "
        f"{named(left)}, among {quantizers} quantizers that are left in the graph the runtime executes.",
        remedy="Put a quantizer behind every convolution, linear layer and sum as well as before it, fold batch norm, "
        "and write activations as this processor's kernels read them (uint8 on x86): export.qdq.to_u8_activations.",
        layers=tuple(left),
        share_of_time=case.share(lambda node: node.layer in left or node.kind == "conversion"),
        severity="high",
    )


def few_integer_layers(name: str, share: float) -> str:
    """The sentence on layers that fell back to float."""
    return (
        f"Only {share:.0%} of the weight layers of '{name}' run as integer kernels; the rest convert to float and back."
    )


def kept_in_float(case: Case) -> Iterator[Finding]:
    """Layers of a quantized file whose weights were never quantized."""
    facts = case.candidate
    left = [layer.layer for layer in facts.layers if not layer.quantized]
    if facts.quantization not in ("static", "dynamic") or not left:
        return
    share = facts.operators.profile.share_of_layers(left)
    yield Finding(
        code="kept_in_float",
        title="Layers were left out of quantization",
        evidence=f"{len(left)} of {len(facts.layers)} layers have float weights: {named(left)}. They take {share:.0%} "
        "of the time of all operators.",
        remedy="If accuracy allows it, quantize them too (keep_float in the recipe, nodes_to_exclude in other tools).",
        layers=tuple(left),
        share_of_time=share,
        severity="medium" if share > DOMINATES else "low",
    )


def activation_type(case: Case) -> Iterator[Finding]:
    """Activations in the form of another processor."""
    facts = case.candidate
    signed = sum(number for kind, number in facts.activations.items() if kind.startswith("int8"))
    unsigned = facts.activations.get("uint8", 0)
    total = sum(facts.activations.values())
    symmetric = facts.activations.get("int8 symmetric", 0)
    if case.is_x86 and signed:
        form = " with zero point 0, the form TensorRT wants" if symmetric == signed else ""
        yield Finding(
            code="signed_activations",
            title="Activations are int8 on an x86 processor",
            evidence=f"{signed} of {total} activation quantizers of '{facts.name}' write int8{form}. ONNX Runtime's "
            "fast x86 kernels read uint8, and take a ReLU in only where its zero is the end of the range.",
            remedy="Ship the form with uint8 activations: export.qdq.to_u8_activations, the recipe's int8 file, or "
            "activation_type=QuantType.QUInt8 in onnxruntime.quantization. The int8 form is for TensorRT.",
            share_of_time=case.share(lambda node: node.kind != "integer"),
            severity="high",
        )
    elif case.cpu.machine.lower() in ("aarch64", "arm64", "armv8l") and unsigned:
        yield Finding(
            code="unsigned_activations",
            title="Activations are uint8 on an ARM processor",
            evidence=f"{unsigned} of {total} activation quantizers of '{facts.name}' write uint8; int8 activations "
            "with int8 weights are what ARM's dot products take as they are.",
            remedy="Ship the form with int8 activations and int8 weights.",
            severity="low",
        )


def hidden_constants(case: Case) -> Iterator[Finding]:
    """Weights and biases behind an Identity that keeps their layer in float."""
    facts = case.candidate
    blocked = [layer for layer in facts.hidden_constants if layer in facts.operators.float_layers]
    if facts.quantization != "static" or not blocked:
        return
    yield Finding(
        code="hidden_constants",
        title="Shared weights hide behind Identity operators",
        evidence=f"{len(blocked)} layers ({named(blocked)}) read a weight or bias through an Identity, and run in "
        "float. PyTorch's tracing exporter writes equal biases once and passes them on so; quantizers then miss them.",
        remedy="Run onnxruntime.quantization.shape_inference.quant_pre_process before quantization, or export with "
        "torch.onnx.export(dynamo=True).",
        layers=tuple(blocked),
        share_of_time=facts.operators.profile.share_of_layers(blocked),
        severity="high",
    )


def activations_between(case: Case) -> Iterator[Finding]:
    """Activation functions that are computed in float between the layers of a quantized file."""
    facts = case.candidate
    if facts.quantization != "static":
        return
    nodes = facts.operators.profile.nodes
    layers = {*facts.operators.integer_layers, *facts.operators.float_layers}
    weighted = [place for place, node in enumerate(nodes) if node.macs is not None and node.layer in layers]
    between = nodes[weighted[0] : weighted[-1]] if weighted else ()
    found = [node for node in between if node.operator in ACTIVATIONS and node.kind == "float"]
    if not found:
        return
    kinds = sorted({node.operator for node in found})
    yield Finding(
        code="activations_in_float",
        title="Activation functions break the chain of integer layers",
        evidence=f"{len(found)} {' and '.join(kinds)} operators run in float between layers of '{facts.name}', each "
        "with a conversion before and behind it.",
        remedy="Train the student with ReLU: an integer layer takes it in. A ReLU6 goes too when activations are uint8 "
        "and their range ends at 6.",
        layers=tuple(dict.fromkeys(node.layer for node in found if node.layer)),
        share_of_time=sum(node.share for node in found),
        severity="medium",
    )


def processor(case: Case) -> Iterator[Finding]:
    """What the processor lacks for byte products."""
    facts, cpu = case.candidate, case.cpu
    if facts.quantization not in ("static", "dynamic"):
        return
    if not (cpu.vnni or cpu.amx_int8 or cpu.dot_product):
        yield Finding(
            code="no_dot_product",
            title="The processor has no byte products",
            evidence=f"{without_vnni()} It is '{cpu.model}' ({cpu.machine}).",
            remedy="Expect speed from INT8 on processors with VNNI, AMX or ARM's dot product; here it saves memory.",
            share_of_time=facts.operators.profile.share_of("integer"),
            severity="medium",
        )
    unsigned = facts.activations.get("uint8", 0) > 0 or facts.quantization == "dynamic"
    if cpu.saturates and unsigned and facts.wide_weights:
        yield Finding(
            code="saturation",
            title="Products of bytes can overflow",
            evidence="Without VNNI this x86 processor adds products of uint8 and int8 in pairs in 16 bits, and weights "
            f"of '{facts.name}' use the full 8 bits: large activations give wrong sums, with no warning.",
            remedy="Write weights as uint8 (export.qdq.weight_form does so here), or use 7 bits (reduce_range).",
            share_of_time=facts.operators.profile.share_of("integer"),
            severity="medium",
        )


def without_vnni() -> str:
    """The sentence on processors without byte products."""
    return "This processor multiplies bytes without VNNI, so an integer layer gains little over a float one."


def dominated(case: Case) -> Iterator[Finding]:
    """Float operators, or conversions, that take much of a quantized file's time."""
    facts = case.candidate
    if facts.quantization not in ("static", "dynamic"):
        return
    for row in facts.operators.profile.by_operator():
        if row.kind != "float" or row.share <= DOMINATES:
            continue
        nodes = [
            node for node in facts.operators.profile.nodes if node.operator == row.operator and node.kind == "float"
        ]
        layers = tuple(dict.fromkeys(node.layer for node in sorted(nodes, key=lambda n: -n.share) if node.layer))
        where = f", most of it in {named(layers, 3)}" if layers else ""
        yield Finding(
            code="float_dominates",
            title=f"{row.operator} in float takes much of the time",
            evidence=f"{row.count} {row.operator} operators that stayed in float take {row.share:.0%} of the time "
            f"of all operators{where}.",
            remedy="Make this operator integer (see the other findings), or replace it: quantizing the rest cannot "
            "help further.",
            layers=layers,
            share_of_time=row.share,
            severity="high",
        )
    share = facts.operators.profile.share_of("conversion")
    if share > DOMINATES:
        number = sum(node.kind == "conversion" for node in facts.operators.profile.nodes)
        yield Finding(
            code="conversions_dominate",
            title="Conversions take much of the time",
            evidence=f"{number} operators that only convert between number formats and memory layouts take "
            f"{share:.0%} of the time of all operators.",
            remedy="Quantize what lies between two integer layers too, so that values stay integers.",
            share_of_time=share,
            severity="high",
        )


def quantized_at_run_time(case: Case) -> Iterator[Finding]:
    """Dynamic or weight-only quantization where the ranges could be known beforehand."""
    facts = case.candidate
    counts = facts.operators.histogram.stored
    if facts.quantization == "dynamic":
        number = counts.get("DynamicQuantizeLinear", 0) or sum(
            n for op, n in counts.items() if op.startswith("Dynamic")
        )
        yield Finding(
            code="dynamic_quantization",
            title="Activations are quantized at run time",
            evidence=f"{number} DynamicQuantizeLinear operators of '{facts.name}' look for the range of their tensor "
            "at every call; products come back as int32 and are scaled in float.",
            remedy="Calibrate once and store the ranges: kind ptq or qat in a recipe, quantize_static in "
            "onnxruntime.quantization. Dynamic quantization suits large matrix products of text models.",
            share_of_time=case.share(lambda node: node.kind != "integer"),
            severity="high",
        )
    elif facts.quantization == "weights only":
        stored = sorted({layer.dtype for layer in facts.layers if layer.quantized})
        yield Finding(
            code="weights_only",
            title="Only weights are quantized",
            evidence=f"Weights of '{facts.name}' are stored as {' and '.join(stored)} and turned back into floats; no "
            "activation is quantized, so every layer computes in float.",
            remedy="That makes the file smaller, not faster. For speed quantize activations too.",
            layers=tuple(layer.layer for layer in facts.layers if layer.quantized),
            share_of_time=facts.operators.profile.share_of("float"),
            severity="high",
        )


def half_precision(case: Case) -> Iterator[Finding]:
    """float16 on a processor that computes in float32."""
    facts = case.candidate
    half = [layer.layer for layer in facts.layers if layer.dtype == "float16"]
    if not case.is_x86 or not half:
        return
    yield Finding(
        code="float16",
        title="float16 runs as float32",
        evidence=f"{len(half)} of {len(facts.layers)} layers of '{facts.name}' have float16 weights; ONNX Runtime "
        "turns them into float32 on this processor, so the file is half as large and no faster.",
        remedy="Use float16 on GPUs and ARM; on x86 ship float32, or INT8 for speed.",
        layers=tuple(half),
        severity="medium",
    )
