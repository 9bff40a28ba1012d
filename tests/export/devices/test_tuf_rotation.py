"""Keys that change: chains of roots, keys of the other roles, version numbers that begin again (D18)."""

# pyright: reportPrivateImportUsage=false

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root

from export.devices.agent import durable, pull
from export.devices.agent.errors import Refused
from export.devices.repository import Order
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.test_agent_pull import Fleet
from tests.export.devices.tuf_attacker import (
    GARBAGE,
    ONLINE,
    Attacker,
    Change,
    committed,
    copied,
    fleet_with_bundle_2,
    lose_copies,
    past,
    resigned,
    stranger,
)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, dict[str, bytes]]]:
    yield from fleet_with_bundle_2(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def attacker(start: tuple[Fleet, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attacker:
    return copied(start, tmp_path, monkeypatch)


# --- chains of roots ---


@dataclass(frozen=True)
class Link:
    """One version of root: its root keys by letters, how many are needed, and who signed it."""

    keys: str
    threshold: int
    signed_by: str
    expired: bool = False


class Chain:
    """Roots that follow the first one, whose keys are two of A, B and C."""

    def __init__(self, attacker: Attacker) -> None:
        self.attacker = attacker
        self.keys = dict(zip("ABC", attacker.fleet.keys["root"], strict=True))
        self.version = 1

    def signers(self, letters: str) -> list[CryptoSigner]:
        return [self.keys.setdefault(letter, stranger()) for letter in letters]

    def add(self, link: Link, change: Change = lambda root: None) -> None:
        root = self.attacker.read("root")
        assert isinstance(root.signed, Root)
        for key_id in list(root.signed.roles["root"].keyids):
            root.signed.revoke_key(key_id, "root")
        for signer in self.signers(link.keys):
            root.signed.add_key(signer.public_key, "root")
        root.signed.roles["root"].threshold = link.threshold
        root.signed.expires = past(1 if link.expired else -30)
        self.version += 1
        root.signed.version = self.version
        change(root)
        self.attacker.store("root", root, self.signers(link.signed_by), self.version)

    def take_over(self, root: Metadata) -> None:
        """Let the attacker's keys be those of the other roles, and order bundle 66."""
        mine = {role: [stranger()] for role in ONLINE}
        give(root, mine)
        self.attacker.signers |= mine


def give(root: Metadata, keys: dict[str, list[CryptoSigner]], threshold: int = 1) -> None:
    for role, signers in keys.items():
        for key_id in list(root.signed.roles[role].keyids):
            root.signed.revoke_key(key_id, role)
        for signer in signers:
            root.signed.add_key(signer.public_key, role)
        root.signed.roles[role].threshold = threshold


FIVE = Link("ABCDE", 3, "ABCDE")
ONE = Link("A", 1, "AB")
RIGHT: dict[str, list[Link]] = {
    "the_same_keys": [Link("ABC", 2, "BC")],
    "one_key_for_another": [ONE, Link("D", 1, "AD"), Link("D", 1, "D")],
    "signatures_by_strangers_besides": [Link("A", 1, "XABY"), Link("D", 1, "XDAY"), Link("D", 1, "XDY")],
    "each_time_by_others_of_five": [FIVE, Link("ABCDE", 3, "ACE"), Link("ABCDE", 3, "BDE"), Link("ABCDE", 3, "ABD")],
    "one_of_five_replaced": [FIVE, Link("ABDEF", 3, "ABE")],
    "one_of_five_replaced_by_different_keys": [FIVE, Link("ABDEF", 3, "ACEF"), Link("ABDEF", 3, "AEF")],
    "all_of_five_replaced": [FIVE, Link("FGHIJ", 3, "ACEFGH"), Link("FGHIJ", 3, "HIJ")],
    "the_threshold_is_raised": [Link("ABC", 1, "AB"), Link("ABC", 2, "AB")],
    "the_threshold_is_lowered": [Link("ABC", 1, "AB"), Link("ABC", 1, "C")],
    "a_key_more_and_a_higher_threshold": [ONE, Link("AB", 2, "AB")],
    "a_key_removed_and_added_again": [Link("BC", 2, "BC"), Link("ABC", 2, "BC"), Link("ABC", 2, "AB")],
    "all_keys_removed_and_added_again": [Link("DE", 2, "ABDE"), Link("ABC", 2, "DEAB"), Link("ABC", 2, "AC")],
    "an_expired_one_in_the_middle": [Link("ABC", 2, "AB", expired=True), Link("ABC", 2, "AB")],
    "two_keys_of_five_lost": [FIVE, Link("ABCFG", 3, "ABC")],
}
WRONG: dict[str, tuple[list[Link], str]] = {
    "not_signed": ([Link("ABC", 2, "")], "0/2 keys"),
    "signed_by_too_few": ([Link("ABC", 2, "A")], "1/2 keys"),
    "signed_by_strangers": ([Link("ABC", 2, "XY")], "0/2 keys"),
    "signed_by_the_new_keys_alone": ([Link("XYZ", 2, "XYZ")], "0/2 keys"),
    "signed_by_the_old_keys_alone": ([Link("XYZ", 2, "ABC")], "0/2 keys"),
    "signed_by_too_few_of_the_old": ([Link("XYZ", 2, "AXYZ")], "1/2 keys"),
    "signed_by_too_few_of_the_new": ([Link("XYZ", 2, "ABX")], "1/2 keys"),
    "one_for_another_without_the_old": ([ONE, Link("X", 1, "XBC")], "0/1 keys"),
    "one_for_another_without_the_new": ([ONE, Link("X", 1, "ABC")], "0/1 keys"),
    "one_of_five_without_three_of_the_new": ([FIVE, Link("ABDEX", 3, "ACE")], "2/3 keys"),
    "one_of_five_without_three_of_the_old": ([FIVE, Link("ABDEX", 3, "AEX")], "2/3 keys"),
    "a_higher_threshold_that_it_does_not_meet": ([Link("ABC", 1, "AB"), Link("ABC", 2, "A")], "1/2 keys"),
    "a_lower_threshold_that_it_alone_meets": ([Link("ABC", 1, "A")], "1/2 keys"),
    "a_key_that_was_removed": ([Link("BC", 2, "BC"), Link("ABC", 2, "AB")], "1/2 keys"),
    "a_threshold_that_cannot_be_met": ([Link("ABC", 4, "ABC")], "3/4 keys"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_chain_of_roots_is_followed(attacker: Attacker, name: str) -> None:
    chain = Chain(attacker)
    for link in RIGHT[name]:
        chain.add(link)
    attacker.fleet.order(3)
    committed(attacker, 3)
    assert attacker.device.floor["repository"]["root"] == chain.version


@pytest.mark.parametrize("name", WRONG)
def test_a_root_that_does_not_follow_is_refused(attacker: Attacker, name: str) -> None:
    """It would give the other roles to the attacker, who has signed what comes after it."""
    links, says = WRONG[name]
    chain = Chain(attacker)
    for link in links[:-1]:
        chain.add(link)
    chain.add(links[-1], chain.take_over)
    attacker.publish()
    attacker.must_fail(says)
    attacker.must_recover()


def test_a_root_that_has_expired_is_waited_out(attacker: Attacker) -> None:
    """Until there is a newer one, nothing that it vouches for is taken."""
    chain = Chain(attacker)
    chain.add(Link("ABC", 2, "AB", expired=True))
    attacker.fleet.order(3)
    attacker.must_fail("Final root.json is expired")
    chain.add(Link("ABC", 2, "BC"))
    committed(attacker, 3)


def no_role(root: Metadata) -> None:
    del root.signed.roles["snapshot"]


def odd_key(**fields: Any) -> Change:
    def change(root: Metadata) -> None:
        key = root.signed.keys[root.signed.roles["targets"].keyids[0]]
        for name, value in fields.items():
            setattr(key, name, value)

    return change


def same_id_twice(root: Metadata) -> None:
    keys = root.signed.roles["snapshot"].keyids
    keys.append(keys[0])


def version(number: int) -> Change:
    return lambda root: setattr(root.signed, "version", number)


ODD: dict[str, tuple[Change, str]] = {
    "of_the_version_before": (version(1), "Expected root version 2"),
    "of_the_version_after": (version(3), "Expected root version 2"),
    "of_version_0": (version(0), "Deserialization"),
    "too_long": (lambda root: root.signed.unrecognized_fields.update(padding="x" * 520_000), "exceeding the maximum"),
    "without_a_role": (no_role, "Deserialization"),
    "with_the_same_key_id_twice": (same_id_twice, "Deserialization"),
    "with_threshold_0": (lambda root: setattr(root.signed.roles["targets"], "threshold", 0), "Deserialization"),
    "with_an_unknown_kind_of_key": (odd_key(keytype="abacus"), "Deserialization"),
    "with_an_unknown_scheme": (odd_key(scheme="abacus"), "Deserialization"),
    "with_a_key_without_a_value": (odd_key(keyval={}), "Deserialization"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_root_is_refused_though_enough_keys_have_signed_it(attacker: Attacker, name: str) -> None:
    change, says = ODD[name]
    attacker.publish()
    Chain(attacker).add(Link("ABC", 2, "ABC"), change)
    attacker.must_fail(says)
    attacker.must_recover(*ONLINE)


@pytest.mark.parametrize("name", GARBAGE)
def test_a_root_that_is_garbage_is_refused(attacker: Attacker, name: str) -> None:
    attacker.publish()
    Chain(attacker).add(Link("ABC", 2, "ABC"))
    attacker.edit("root", GARBAGE[name])
    attacker.must_fail("Deserialization|0/2 keys")
    attacker.must_recover(*ONLINE)


@pytest.mark.parametrize("role", ONLINE)
def test_metadata_of_another_role_are_no_root(attacker: Attacker, role: str) -> None:
    attacker.publish()
    attacker.store("root", attacker.read(role), attacker.fleet.keys["root"], 2)
    attacker.must_fail(f"Expected 'root', got '{role}'")
    attacker.must_recover(*ONLINE)


def test_the_same_signature_twice_does_not_count_twice(attacker: Attacker) -> None:
    chain = Chain(attacker)
    chain.add(Link("ABC", 2, "A"), chain.take_over)
    attacker.publish()
    resigned("root", lambda content: content["signatures"].append(content["signatures"][0]))(attacker)
    attacker.must_fail("Deserialization")
    attacker.must_recover()


@pytest.mark.parametrize(
    "make", [CryptoSigner.generate_ed25519, CryptoSigner.generate_ecdsa, CryptoSigner.generate_rsa]
)
def test_each_kind_of_key_that_tuf_knows_may_sign(attacker: Attacker, make: Callable[[], CryptoSigner]) -> None:
    chain = Chain(attacker)
    chain.keys["D"] = make()
    chain.add(Link("ABCD", 4, "ABCD"))
    right = attacker.path("root").read_bytes()
    content = json.loads(right)
    for row in content["signatures"]:
        if row["keyid"] == chain.keys["D"].public_key.keyid:
            row["sig"] = row["sig"][::-1]
    attacker.path("root").write_bytes(json.dumps(content).encode())
    attacker.fleet.order(3)
    attacker.must_fail("3/4 keys")
    attacker.path("root").write_bytes(right)
    committed(attacker, 3)


def test_fields_of_a_root_that_nobody_knows_do_no_harm(attacker: Attacker) -> None:
    """They are signed with the rest; what an older TUF said of how key ids are made says nothing now."""

    def add(root: Metadata) -> None:
        root.signed.unrecognized_fields["more"] = {"a": [1]}
        root.signed.roles["root"].unrecognized_fields["more"] = 1
        for key in root.signed.keys.values():
            key.unrecognized_fields["keyid_hash_algorithms"] = "md5"

    Chain(attacker).add(Link("ABC", 2, "AB"), add)
    attacker.fleet.order(3)
    committed(attacker, 3)


def test_a_chain_with_a_version_left_out_is_not_followed(attacker: Attacker) -> None:
    chain = Chain(attacker)
    chain.add(Link("ABC", 2, "AB"), chain.take_over)
    chain.add(Link("ABC", 2, "AB"))
    (attacker.metadata / "2.root.json").unlink()
    attacker.publish()
    attacker.must_fail("0/1 keys")
    attacker.must_recover()


def test_an_older_root_is_not_gone_back_to(attacker: Attacker) -> None:
    """Its keys were given up; the newer roots are withheld, and tuf's copies were lost with the power."""
    old = dict(attacker.signers)
    attacker.rotate(*ONLINE)
    attacker.fleet.order(3)
    attacker.honest = attacker.files()
    committed(attacker, 3)
    lose_copies(attacker)
    attacker.restore(attacker.older)
    attacker.signers = old
    for _ in range(9):
        attacker.publish()
    with pytest.raises(Refused, match="root metadata have version 1, expected 2 or more"):
        pull.poll(attacker.device)
    attacker.restore(attacker.honest)
    attacker.fleet.order(4)
    committed(attacker, 4)


# --- the keys of the other roles ---

OTHERS: dict[str, tuple[Link, str]] = {
    "another_key": (Link("D", 1, "D"), ""),
    "signatures_by_strangers_besides": (Link("D", 1, "XDY"), ""),
    "the_first_three_of_five": (Link("DEFGH", 3, "DEF"), ""),
    "the_last_three_of_five": (Link("DEFGH", 3, "FGH"), ""),
    "three_of_five_in_another_order": (Link("DEFGH", 3, "HDF"), ""),
    "all_of_five": (Link("DEFGH", 3, "DEFGH"), ""),
    "not_signed_by_the_new_key": (Link("D", 1, "XYZ"), "0/1 keys"),
    "one_of_three_by_a_stranger": (Link("DEFGH", 3, "DEX"), "2/3 keys"),
    "one_of_three_absent": (Link("DEFGH", 3, "DE"), "2/3 keys"),
    "more_needed_than_there_are": (Link("DEF", 4, "DEF"), "3/4 keys"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    "role", ["timestamp", *(pytest.param(role, marks=pytest.mark.slow) for role in ("targets", "snapshot"))]
)
def test_a_role_is_signed_by_as_many_of_its_own_keys_as_root_says(attacker: Attacker, role: str, name: str) -> None:
    link, says = OTHERS[name]
    chain = Chain(attacker)
    chain.add(Link("ABC", 2, "AB"), lambda root: give(root, {role: chain.signers(link.keys)}, link.threshold))
    if says:
        attacker.signers[role] = chain.signers(link.signed_by)
        attacker.publish()
        attacker.must_fail(says)
        fresh = {each: [stranger()] for each in ONLINE}
        chain.add(Link("ABC", 2, "AB"), lambda root: give(root, fresh))
        attacker.honest |= {file: data for file, data in attacker.files().items() if file.endswith("root.json")}
        attacker.fleet.repository.signers = {**attacker.fleet.keys, **fresh}
        attacker.must_recover()
    else:
        attacker.fleet.repository.signers = {**attacker.fleet.keys, role: chain.signers(link.signed_by)}
        attacker.fleet.order(3)
        committed(attacker, 3)


# --- versions that begin again (TUF, 5.3.11) ---


@pytest.mark.parametrize(
    ("role", "replaced"),
    [("timestamp", ("timestamp",)), ("snapshot", ("snapshot", "timestamp")), ("targets", ("snapshot", "timestamp"))],
    ids=["timestamp", "snapshot", "targets"],
)
@pytest.mark.parametrize("lost", [False, True], ids=["copies_kept", "copies_lost"])
def test_version_numbers_that_a_thief_has_used_up_begin_again_with_other_keys(
    attacker: Attacker, role: str, replaced: tuple[str, ...], lost: bool
) -> None:
    def far(metadata: Metadata) -> None:
        metadata.signed.version = 2**31

    attacker.publish({role: far}, first=role)
    assert pull.poll(attacker.device)["phase"] == "nothing"
    assert attacker.device.floor["repository"][role] == 2**31
    attacker.restore(attacker.honest)
    with pytest.raises(Refused):  # with the same keys they do not
        pull.poll(attacker.device)
    if lost:
        lose_copies(attacker)
    attacker.must_recover(*replaced)
    assert attacker.device.floor["repository"][role] < 99


def test_a_key_that_is_added_lets_no_version_begin_again(attacker: Attacker) -> None:
    """What the old keys have signed is still good, so old metadata could be served again."""
    keys = {role: [*attacker.fleet.keys[role], stranger()] for role in ONLINE}
    lose_copies(attacker)
    attacker.restore(attacker.older)
    Chain(attacker).add(Link("ABC", 2, "AB"), lambda root: give(root, keys))
    attacker.must_fail("timestamp metadata have version 2, expected 3 or more")
    attacker.must_recover()


# --- ten rotations, with the device off (D18) ---


def test_a_device_that_was_off_for_ten_rotations_each_after_a_lost_key_is_updated(attacker: Attacker) -> None:
    """Two of three sign. At each rotation one key is lost, and the two that are left sign for a new third."""
    chain, keys = Chain(attacker), "ABC"
    for new in "DEFGHIJKL":
        left = keys[1:]
        keys = left + new
        chain.add(Link(keys, 2, left))
    assert (chain.version, set(keys) & set("ABC")) == (10, set())
    attacker.fleet.order(3)
    committed(attacker, 3)
    assert attacker.device.floor["repository"]["root"] == 10


def test_a_device_that_was_off_while_all_ten_roots_expired_is_updated(attacker: Attacker) -> None:
    chain = Chain(attacker)
    for number in range(2, 11):
        chain.add(Link("ABC", 2, "AB", expired=number < 10), lambda root: None)
    attacker.fleet.order(3)
    committed(attacker, 3)


@pytest.mark.slow
def test_three_hundred_rotations_are_not_too_many(attacker: Attacker) -> None:
    """tuf's own limit is 256 at once, and each poll begins at the first root."""
    chain = Chain(attacker)
    for _ in range(300):
        chain.add(Link("ABC", 2, "AB"))
    attacker.fleet.order(3)
    committed(attacker, 3)
    attacker.fleet.order(4)
    committed(attacker, 4)
    assert attacker.device.floor["repository"]["root"] == 301


def test_a_bundle_refused_for_its_key_is_taken_when_the_key_is_trusted(attacker: Attacker) -> None:
    bundle = made_up.write(
        attacker.fleet.folder / "digits-3.edgepkg", made_up.members(3), seq=3, keys=(made_up.key(9),)
    )
    attacker.fleet.repository.publish(bundle, {"lab-1": Order(bundle=bundle.name, name="digits", seq=3)})
    attacker.must_fail("expected a trusted key")
    durable.write_json(attacker.device.root / "trust.json", made_up.trust(made_up.key(9), version=2))
    committed(attacker, 3)
