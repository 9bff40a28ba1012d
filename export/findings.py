"""What makes a file slow or large, one check each: from facts of two files and of this processor to findings.

The reasons are those that users of quantization and pruning tools report most: convolutions that stay in float between
quantizers, a graph in TensorRT's form on a CPU, widths that leave vector lanes idle, nets so small that the runtime
itself takes the time.
"""

from collections.abc import Iterator

from export.finding import Case, Check, Finding, named
from export.findings_int8 import (
    activation_type,
    activations_between,
    dominated,
    half_precision,
    hidden_constants,
    kept_in_float,
    processor,
    quantized_at_run_time,
    unfused,
)

MICROSECONDS_PER_NODE = 10.0
"""Below this mean time per operator a net spends its time between operators, where int8 saves nothing."""

LANES = 8
"""Widths should be multiples of this: the fewest float32 lanes of a vector (AVX2; AVX-512 has 16)."""

THIN = 16
"""Fewer channels than this leave most of a wide vector empty."""


def find(case: Case) -> tuple[Finding, ...]:
    """All findings on the candidate, those that concern most of its time first; what is only worth knowing is last."""
    found = [finding for check in CHECKS for finding in check(case)]
    return tuple(sorted(found, key=lambda each: (each.severity == "low", -(each.share_of_time or 0.0))))


def batch_norm(case: Case) -> Iterator[Finding]:
    """Batch norm that is still computed, or that stands between a quantized layer and its quantizer."""
    facts = case.candidate
    counts = facts.operators.histogram
    stored, left = (each.get("BatchNormalization", 0) for each in (counts.stored, counts.optimised))
    number = stored if facts.quantization == "static" else left
    if not number:
        return
    yield Finding(
        code="batch_norm",
        title="Batch norm is not folded",
        evidence=f"'{facts.name}' holds {stored} BatchNormalization operators, and {left} are computed at every call"
        + ("; in front of a quantizer one keeps its convolution in float." if facts.quantization == "static" else "."),
        remedy="Fold batch norm into the convolution before quantization and export (compression.quantize does; "
        "quant_pre_process of onnxruntime.quantization for graphs of other tools). One in front of its convolution "
        "cannot be folded: turn their order round before training.",
        share_of_time=case.share(lambda node: node.operator == "BatchNormalization"),
        severity="high" if facts.quantization == "static" else "medium",
    )


def widths(case: Case) -> Iterator[Finding]:
    """Convolutions whose channels do not fill the processor's vectors."""
    facts = case.candidate
    lanes = 16 if case.cpu.avx512 else LANES
    inner = [layer for layer in facts.layers[:-1] if "Conv" in layer.operator and layer.output_channels > 0]
    odd = [layer for layer in inner if layer.width % LANES]
    if odd:
        used = sum(layer.width for layer in odd)
        padded = sum(-(-layer.width // lanes) * lanes for layer in odd)
        shown = ", ".join(f"'{layer.layer}' {layer.width}" for layer in odd[:4])
        yield Finding(
            code="odd_channels",
            title="Widths are no multiples of 8",
            evidence=f"{len(odd)} of {len(inner)} convolutions compute numbers of channels that {LANES} does not "
            f"divide ({shown}{', ...' if len(odd) > 4 else ''}). In vectors of {lanes} that leaves "
            f"{1 - used / padded:.0%} of their lanes idle.",
            remedy="Prune and search in steps of 8, better 16 (round_to in a recipe); between two widths with "
            "the same number of vectors the larger one costs no time.",
            layers=tuple(layer.layer for layer in odd),
            share_of_time=facts.operators.profile.share_of_layers(layer.layer for layer in odd),
            severity="medium",
        )
    thin = [layer for layer in inner if layer.width < THIN and layer not in odd]
    if thin:
        yield Finding(
            code="thin_layers",
            title=f"Layers have fewer than {THIN} channels",
            evidence=f"{len(thin)} of {len(inner)} convolutions compute fewer than {THIN} channels "
            f"({named([layer.layer for layer in thin])}); a vector holds {lanes}, integer kernels take 16 or more.",
            remedy="A few wider layers instead of many thin ones use the processor better at the same number of "
            "multiplications.",
            layers=tuple(layer.layer for layer in thin),
            share_of_time=facts.operators.profile.share_of_layers(layer.layer for layer in thin),
            severity="low",
        )


def between_operators(case: Case) -> Iterator[Finding]:
    """A net so small that the runtime's own work takes the time."""
    facts, profile = case.candidate, case.candidate.operators.profile
    number = len(profile.nodes)
    microseconds = case.speed.p50_ms * 1e3 if case.speed and case.speed.p50_ms else profile.call_us
    if number and microseconds / number < MICROSECONDS_PER_NODE:
        yield Finding(
            code="tiny_net",
            title="Time goes by between operators",
            evidence=tiny_net(number, microseconds / number, quantized=facts.quantization != "none"),
            remedy="Run larger batches, or make the net shallower and wider: fewer operators, not fewer "
            "multiplications.",
            severity="low" if case.speed is not None and case.speed.faster == "yes" else "medium",
        )


def tiny_net(number: int, microseconds: float, *, quantized: bool = True) -> str:
    """The sentence on nets whose operators take less time than the runtime."""
    more = ", and quantization adds operators" if quantized else ""
    each = f"{number} operators take {microseconds:.1f} µs each"
    return f"The net is tiny: {each}, most of it the runtime's own overhead{more}."


def size(case: Case) -> Iterator[Finding]:
    """Why a file is larger than its number format promises."""
    facts, reference = case.candidate, case.reference
    each = f"{facts.size_bytes / 1024:,.1f} KiB, {facts.bytes_per_parameter():.2f} bytes per parameter"
    if facts.float_weights:
        yield Finding(
            code="float_weights",
            title="Weights are stored as floats",
            evidence=f"{len(facts.float_weights)} layers ({named(facts.float_weights)}) keep float weights in front of "
            f"a QuantizeLinear: '{facts.name}' has {each}.",
            remedy="Store the integers: fold QuantizeLinear over constants before shipping (our exports do).",
            layers=facts.float_weights,
            severity="medium",
        )
    if facts.duplicate_bytes:
        yield Finding(
            code="duplicate_weights",
            title="Weights are stored twice",
            evidence=f"{len(facts.duplicates)} tensors repeat the bytes of another one, "
            f"{facts.duplicate_bytes / 1024:,.1f} KiB in all ({named(facts.duplicates)}).",
            remedy="Store them once and let both layers name the same tensor.",
            severity="low",
        )
    if facts.external_bytes:
        yield Finding(
            code="external_data",
            title="Weights lie in another file",
            evidence=f"'{facts.name}' needs {facts.external_bytes / 1024:,.1f} KiB in files beside it; sizes here "
            "count them.",
            remedy="Ship both, or store the weights inside (up to 2 GiB).",
            severity="low",
        )
    saved = facts.size_bytes / max(reference.size_bytes, 1)
    expected = facts.quantization != "none" and reference.quantization == "none"
    if expected and saved > 0.5 and not facts.float_weights and reference.parameters >= facts.parameters:
        yield Finding(
            code="size_not_shrunk",
            title="The file has hardly shrunk",
            evidence=f"'{facts.name}' has {saved:.0%} of the size of '{reference.name}' ({each}); "
            f"{facts.weight_bytes / max(facts.size_bytes, 1):.0%} of it are weights, the rest describes the graph.",
            remedy="Nothing for a net this small."
            if facts.weight_bytes < 0.7 * facts.size_bytes
            else "Quantize the layers whose weights are still floats.",
            severity="low",
        )


def pruned(case: Case) -> Iterator[Finding]:
    """Fewer multiplications without less time."""
    facts, reference, speed = case.candidate, case.reference, case.speed
    macs, before = (each.operators.profile.macs / each.operators.profile.batch for each in (facts, reference))
    same_form = (facts.quantization == "none") == (reference.quantization == "none")
    if speed is None or not same_form or not before or macs >= 0.9 * before:
        return
    share = macs / before
    if speed.low < 1 - (1 - share) / 2:  # at least half of what the multiplications promise may be there
        return
    nodes, nodes_before = (len(each.operators.profile.nodes) for each in (facts, reference))
    odd = [layer.layer for layer in facts.layers[:-1] if "Conv" in layer.operator and layer.width % LANES]
    reason = f" {len(odd)} convolutions have widths that {LANES} does not divide." if odd else ""
    yield Finding(
        code="pruned_not_faster",
        title="Fewer multiplications did not save time",
        evidence=f"'{facts.name}' computes {share:.0%} of the multiplications of '{reference.name}' in "
        f"{speed.ratio:.0%} of its time, with {nodes} operators against {nodes_before}.{reason}",
        remedy="Remove whole layers or round widths to multiples of 8 or 16, and search on measured latency, not on "
        "multiplications.",
        layers=tuple(odd),
        severity="high",
    )


CHECKS: tuple[Check, ...] = (
    *(unfused, activation_type, hidden_constants, batch_norm, quantized_at_run_time, dominated, pruned, half_precision),
    *(processor, activations_between, kept_in_float, widths, between_operators, size),
)
