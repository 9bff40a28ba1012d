"""Attacks on what devices pull, over a real HTTP server: metadata, downloads, orders. Roots are in test_tuf_rotation.

Each is refused for its own reason, changes nothing on the device, and does not keep it from following the honest
repository afterwards.
"""

# pyright: reportPrivateImportUsage=false

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, MetaFile

from export.devices.repository import Order
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.test_agent_pull import Fleet
from tests.export.devices.tuf_attacker import (
    EVIL,
    GARBAGE,
    ONLINE,
    Attack,
    Attacker,
    absent,
    changed,
    copied,
    evil_bundle,
    fields,
    fleet_with_bundle_2,
    garbage,
    listed,
    lose_copies,
    not_there,
    of_type,
    of_version,
    older_file,
    ordered,
    padded,
    past,
    refers,
    resigned,
    sent,
    signatures,
    signed_by,
)

ATTACKS: dict[str, Attack] = {}


def attack(says: str, *stolen: str) -> Callable[[Callable[[Attacker], None]], Callable[[Attacker], None]]:
    def keep(act: Callable[[Attacker], None]) -> Callable[[Attacker], None]:
        ATTACKS[act.__name__.strip("_")] = Attack(act, says, stolen)
        return act

    return keep


def attack_named(name: str, act: Callable[[Attacker], None], says: str, *stolen: str, slow: bool = False) -> None:
    ATTACKS[name] = Attack(act, says, stolen, slow)


def others(role: str) -> dict[str, bool]:
    """Of what is done to each role alike the quick suite does it to one."""
    return {"slow": role != "timestamp"}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, dict[str, bytes]]]:
    """A fleet whose device has bundle 2, to be copied, and its repository of before."""
    yield from fleet_with_bundle_2(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def attacker(start: tuple[Fleet, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attacker:
    return copied(start, tmp_path, monkeypatch)


# --- any role ---

for role in ONLINE:
    for kind, change in GARBAGE.items():
        says = "Deserialization|Unsigned"
        attack_named(f"{role}_{kind}", garbage(role, change), says, *set(ONLINE) - {role}, **others(role))


SIGNATURES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "without_a_signature": (lambda content: content.update(signatures=[]), "0/1 keys"),
    "with_an_empty_signature": (signatures(sig=""), "0/1 keys"),
    "with_a_signature_that_is_no_hexadecimal": (signatures(sig="zz"), "0/1 keys"),
    "with_a_signature_of_zeros": (signatures(sig="00" * 64), "0/1 keys"),
    "with_a_signature_by_an_unknown_key_id": (signatures(keyid="00" * 32), "0/1 keys"),
    "with_the_same_signature_twice": (
        lambda content: content["signatures"].append(content["signatures"][0]),
        "Deserialization",
    ),
}
for role in ONLINE:
    for kind, (change, says) in SIGNATURES.items():
        attack_named(f"{role}_{kind}", resigned(role, change), says, *set(ONLINE) - {role}, **others(role))


for role in ONLINE:
    for other in sorted({*ONLINE, "root", ""} - {role}):
        name = f"{role}_signed_by_{f'the_keys_of_{other}' if other else 'a_stranger'}"
        attack_named(name, signed_by(role, other), "0/1 keys", *set(ONLINE) - {role}, **others(role))


for role in ONLINE:
    for other in sorted({*ONLINE, "root"} - {role}):
        says = f"Expected '{role}', got '{other}'"
        attack_named(f"{role}_of_type_{other}", of_type(role, other), says, *ONLINE, **others(role))


ZEROS = {"sha256": "0" * 64}
CHANGED: dict[str, tuple[str, Callable[[Metadata], None], str]] = {
    "timestamp_that_has_expired": ("timestamp", fields(expires=past()), "timestamp.json is expired"),
    "timestamp_of_a_lower_version": ("timestamp", fields(version=1), "New timestamp version 1 must"),
    "timestamp_of_version_0": ("timestamp", fields(version=0), "Deserialization"),
    "timestamp_that_is_too_long": ("timestamp", padded(17_000), "exceeding the maximum"),
    "timestamp_of_a_later_specification": ("timestamp", fields(spec_version="2.0.0"), "Deserialization"),
    "timestamp_naming_a_lower_snapshot": ("timestamp", refers("snapshot.json", version=1), "New snapshot version must"),
    "timestamp_naming_a_snapshot_that_is_not_there": ("timestamp", refers("snapshot.json", version=99), "status 404"),
    "timestamp_with_another_hash_of_the_snapshot": ("timestamp", refers("snapshot.json", hashes=ZEROS), "hash"),
    "timestamp_with_an_unknown_hash": ("timestamp", refers("snapshot.json", hashes={"md0": "00"}), "md0|nsupported"),
    "timestamp_with_a_shorter_length_of_the_snapshot": ("timestamp", refers("snapshot.json", length=9), "exceeding"),
    "timestamp_with_a_longer_length_of_the_snapshot": ("timestamp", refers("snapshot.json", length=9999), "length"),
    "snapshot_that_has_expired": ("snapshot", fields(expires=past()), "snapshot.json is expired"),
    "snapshot_that_is_too_long": ("snapshot", padded(2_100_000), "exceeding the maximum"),
    "snapshot_naming_lower_targets": ("snapshot", refers("targets.json", version=1), "Expected targets.json version"),
    "snapshot_naming_targets_that_are_not_there": ("snapshot", refers("targets.json", version=99), "status 404"),
    "snapshot_with_another_hash_of_the_targets": ("snapshot", refers("targets.json", hashes=ZEROS), "hash"),
    "snapshot_with_a_shorter_length_of_the_targets": ("snapshot", refers("targets.json", length=9), "exceeding"),
    "snapshot_with_a_longer_length_of_the_targets": ("snapshot", refers("targets.json", length=9999), "length"),
    "snapshot_without_targets": ("snapshot", fields(meta={}), "missing info for 'targets.json'"),
    "snapshot_with_other_roles_instead_of_targets": (
        "snapshot",
        fields(meta={"../targets.json": MetaFile(1), "targets.json?": MetaFile(1)}),
        "missing info for 'targets.json'",
    ),
    "targets_that_have_expired": ("targets", fields(expires=past()), "targets is expired"),
    "targets_that_are_too_long": ("targets", padded(5_100_000), "exceeding the maximum"),
}
for name, (role, change, says) in CHANGED.items():
    attack_named(name, changed(role, change), says, *ONLINE[ONLINE.index(role) :])


for role in ("targets", "snapshot"):
    for by, word in ((1, "higher"), (-1, "lower")):
        attack_named(f"{role}_of_a_{word}_version_than_its_file", of_version(role, by), f"Expected {role} v", *ONLINE)


for role in ONLINE:
    attack_named(f"{role}_not_found", absent(role), "status 404", *ONLINE)

# --- old and new, and of others ---


@attack("New timestamp version")
def _the_whole_older_repository(attacker: Attacker) -> None:
    attacker.restore(attacker.older)


@attack("New timestamp version")
def _an_older_timestamp(attacker: Attacker) -> None:
    attacker.restore(attacker.older, "timestamp.json")


attack_named("an_older_snapshot_under_the_new_name", older_file("snapshot"), "Expected targets.json version 1", *ONLINE)
attack_named("older_targets_under_the_new_name", older_file("targets"), "Expected targets v", *ONLINE)


@attack("0/1 keys")
def _the_repository_of_somebody_else(attacker: Attacker) -> None:
    other = Fleet(attacker.fleet.folder / "elsewhere", "", attacker.fleet.web)
    for seq in (1, 2, EVIL):
        other.order(seq)
    theirs = attacker.fleet.folder / "elsewhere" / "repository"
    files = {str(path.relative_to(theirs)): path.read_bytes() for path in theirs.rglob("*") if path.is_file()}
    attacker.restore({name: data for name, data in files.items() if not name.endswith("1.root.json")}, ".json")


@attack("expected 3 or more")
def _an_older_repository_after_all_copies_were_lost(attacker: Attacker) -> None:
    lose_copies(attacker)
    attacker.restore(attacker.older)


# --- downloads ---


def evil_order(data: bytes) -> bytes:
    return made_up.canonical({"bundle": f"digits-{EVIL}.edgepkg", "name": "digits", "seq": EVIL})


for ending, what in (("lab-1.json", "order"), ("edgepkg", "bundle")):
    for kind, change, says in (
        ("changed", lambda data: data[:-1] + b"?", "hash|other content"),
        ("cut_short", lambda data: data[:-9], "length|in time"),
        ("empty", lambda data: b"", "length|in time"),
    ):
        attack_named(f"{what}_{kind}", sent(ending, change), says)
attack_named("order_longer", sent("lab-1.json", lambda data: data + b" "), "exceeding the maximum")
attack_named("order_endless", sent("lab-1.json", lambda data: data + b" " * 9_000_000), "exceeding the maximum")
attack_named("order_of_the_attacker", sent("lab-1.json", evil_order), "hash|length|exceeding")
attack_named("bundle_of_the_attacker", sent("edgepkg", evil_bundle), "other content")
attack_named("order_not_found", not_there("lab-1.json"), "status 404", *ONLINE)
attack_named("bundle_not_found", not_there("edgepkg"), "404", *ONLINE)


@attack("hash|length|exceeding")
def _the_order_of_another_device(attacker: Attacker) -> None:
    order = Order(bundle="digits-1.edgepkg", name="digits", seq=1)
    attacker.fleet.repository.publish(orders={"lab-2": order})
    attacker.honest = attacker.files()
    theirs = next((attacker.targets / "devices").glob("*.lab-2.json")).read_bytes()
    attacker.fleet.web.mutate = staticmethod(lambda path, data: theirs if path.endswith("lab-1.json") else data)


# --- orders that were signed, by stolen keys or by mistake ---


RIGHT = {"bundle": f"digits-{EVIL}.edgepkg", "name": "digits", "seq": EVIL}
PATHS = ("", "..", "../../slots/b/x", "/etc/x", "a/../b", "a b", "a?b", "a#b", "a%2fb", "a\nb", "\u00e9", 7, None)
ORDERS: dict[str, tuple[Any, str]] = {
    "that_is_no_json": (b"{", "cannot be read"),
    "that_is_not_utf_8": (b"\xff\xff", "cannot be read"),
    "that_is_nested": (b"[" * 60_000, "cannot be read"),
    "that_is_a_list": ([RIGHT], "cannot be read"),
    "that_is_null": (None, "cannot be read"),
    "without_a_number": ({**RIGHT, "seq": None}, "no plain name"),
    "with_a_number_as_text": ({**RIGHT, "seq": "66"}, "no plain name"),
    "with_yes_for_a_number": ({**RIGHT, "seq": True}, "no plain name"),
    "with_no_number_for_a_number": ({**RIGHT, "seq": float("nan")}, "no plain name"),
    "with_a_list_for_a_name": ({**RIGHT, "name": ["digits"]}, "no plain name"),
    "without_a_bundle": ({"name": "digits", "seq": EVIL}, "cannot be read"),
    "of_a_bundle_that_is_not_there": ({**RIGHT, "bundle": "digits-9.edgepkg"}, "expected the bundle it names"),
    "of_an_order_for_a_bundle": ({**RIGHT, "bundle": "devices/lab-1.json"}, "does not begin as one"),
    "that_gives_an_older_bundle_a_higher_number": ({**RIGHT, "bundle": "digits-1.edgepkg"}, "expected digits 66"),
    "that_gives_another_name": ({**RIGHT, "name": "faces"}, "expected faces 66"),
    "that_gives_another_number": ({**RIGHT, "seq": 65}, "expected digits 65"),
    "that_is_too_long": (json.dumps(RIGHT).encode() + b" " * 70_000, "expected at most 65536"),
}
ORDERS |= {f"of_path_{path!r}": ({**RIGHT, "bundle": path}, "no plain name") for path in PATHS}
for name, (content, says) in ORDERS.items():
    attack_named(f"order_{name}", ordered(content), says, *ONLINE)
attack_named("order_of_a_wrong_length", ordered(RIGHT, length=9), "exceeding", *ONLINE)
attack_named("order_with_an_unknown_hash", ordered(RIGHT, hashes={"md0": "00"}), "md0|nsupported", *ONLINE)
attack_named("order_with_one_wrong_hash_of_two", ordered(RIGHT, hashes={**ZEROS, "sha512": "00"}), "404|hash", *ONLINE)


attack_named("bundle_of_a_petabyte", listed(length=10**15), "expected a bundle's", *ONLINE)
attack_named("bundle_of_no_bytes", listed(length=0), "expected a bundle's", *ONLINE)
attack_named("bundle_of_a_negative_length", listed(length=-1), "Deserialization", *ONLINE)
attack_named("bundle_without_sha256", listed(hashes={"sha512": "0" * 128}), "expected a bundle's", *ONLINE)
attack_named("bundle_whose_hash_is_a_path", listed(hashes={"sha256": "../../slots/b"}), "expected a bundle's", *ONLINE)
attack_named("bundle_whose_hash_is_long", listed(hashes={"sha256": "0" * 64 + "/x"}), "expected a bundle's", *ONLINE)
attack_named("bundle_with_another_hash", listed(hashes=ZEROS), "404", *ONLINE)
attack_named("bundle_with_a_shorter_length", listed(length=900), "other content", *ONLINE)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if each.slow else ()) for name, each in ATTACKS.items()]
)
def test_it_is_refused_and_the_honest_repository_is_followed_again(attacker: Attacker, name: str) -> None:
    attack = ATTACKS[name]
    attack.act(attacker)
    attacker.must_fail(attack.says)
    attacker.must_recover(*attack.stolen)
