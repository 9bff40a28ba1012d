"""Keys that nobody else can read, envelopes of which every other spelling is refused, and trust that moves on."""

import base64
import json
import os
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner

from export.bundle import BundleError
from export.bundle.durable import durable_file, write_durably
from export.bundle.envelope import canonical, key_id, pae, read_canonical, read_envelope, seal, signers
from export.bundle.keys import load_key, load_public, new_key
from export.bundle.trust import (
    TRUST_TYPE,
    Trust,
    dump_trust,
    make_trust,
    next_trust,
    open_sealed,
    read_trust,
    seal_next_trust,
)
from flows.bundling import app

SECRET = b"correct horse battery"
TYPE = "application/vnd.test+json"
A, B, C, D = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(4))
ID = {each: key_id(each.public_key()) for each in (A, B, C, D)}


def trust_in(*keys, threshold=1, version=1):
    return make_trust([key.public_key() for key in keys], threshold=threshold, version=version)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def changed(sealed, change):
    """The envelope after a change of its fields, spelled canonically."""
    value = json.loads(sealed)
    change(value)
    return canonical(value)


def test_a_key_comes_back_and_only_its_owner_can_read_it(tmp_path):
    path = tmp_path / "office.pem"
    key = new_key(path, SECRET)
    assert mode(path) == 0o600
    assert path.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert load_key(path, lambda _: SECRET).private_bytes_raw() == key.private_bytes_raw()
    assert key_id(load_public(tmp_path / "office.pub")) == key_id(key.public_key())
    assert sorted(each.name for each in tmp_path.iterdir()) == ["office.pem", "office.pub"]


def test_a_key_is_private_from_the_first_moment(tmp_path, monkeypatch):
    seen = []
    real = os.fsync

    def watching(descriptor):
        seen.extend(mode(path) for path in tmp_path.iterdir() if "pem" in path.name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watching)
    old = os.umask(0)
    try:
        new_key(tmp_path / "office.pem", SECRET)
    finally:
        os.umask(old)
    assert seen
    assert set(seen) == {0o600}


@pytest.mark.parametrize(
    ("secret", "unencrypted"), [(None, False), (b"", False), (b"too short", False), (SECRET, True)]
)
def test_a_key_in_the_open_or_behind_a_short_passphrase_is_refused(tmp_path, secret, unencrypted):
    with pytest.raises(BundleError, match="passphrase"):
        new_key(tmp_path / "a.pem", secret, unencrypted=unencrypted)
    assert not list(tmp_path.iterdir())
    new_key(tmp_path / "a.pem", None, unencrypted=True)
    assert load_key(tmp_path / "a.pem", lambda _: pytest.fail("asked for nothing"))


def test_a_key_is_never_overwritten(tmp_path):
    new_key(tmp_path / "a.pem", SECRET)
    before = (tmp_path / "a.pem").read_bytes()
    with pytest.raises(BundleError, match=r"a\.pub"):
        new_key(tmp_path / "a.pem", SECRET)
    (tmp_path / "a.pub").unlink()
    with pytest.raises(BundleError, match=r"a\.pem.*never overwritten"):
        new_key(tmp_path / "a.pem", SECRET)
    assert (tmp_path / "a.pem").read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.pem"]


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o601])
def test_a_key_that_others_can_touch_is_refused(tmp_path, bits):
    new_key(tmp_path / "a.pem", SECRET)
    (tmp_path / "a.pem").chmod(bits)
    with pytest.raises(BundleError, match="others can use it, expected 0600"):
        load_key(tmp_path / "a.pem", lambda _: SECRET)


def test_a_wrong_passphrase_a_link_another_kind_and_no_file_are_refused(tmp_path):
    new_key(tmp_path / "a.pem", SECRET)
    with pytest.raises(BundleError, match="has not opened"):
        load_key(tmp_path / "a.pem", lambda _: b"something else")
    (tmp_path / "link.pem").symlink_to(tmp_path / "a.pem")
    with pytest.raises(BundleError, match="no file that can be read"):
        load_key(tmp_path / "link.pem", lambda _: SECRET)
    other = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_durably(tmp_path / "rsa.pem", other, mode=0o600)
    with pytest.raises(BundleError, match="another kind than Ed25519"):
        load_key(tmp_path / "rsa.pem", lambda _: SECRET)
    with pytest.raises(BundleError, match="no file that can be read"):
        load_key(tmp_path / "none.pem", lambda _: SECRET)


def test_a_file_that_fails_half_way_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="full"), durable_file(tmp_path / "a") as file:
        file.write(b"half")
        raise OSError("full")
    assert not list(tmp_path.iterdir())


def test_the_signed_bytes_are_those_of_the_dsse_specification():
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_an_envelope_comes_back_and_equal_arguments_give_equal_bytes():
    sealed = seal(b'{"a":1}', TYPE, [A, B])
    assert sealed == seal(b'{"a":1}', TYPE, [B, A])
    payload, signed_by = open_sealed(sealed, TYPE, trust_in(A, B, threshold=2), "It")
    assert (payload, signed_by) == (b'{"a":1}', {ID[A], ID[B]})


@pytest.mark.parametrize("keys", [(), (A,), (A, C), (C,)], ids=len)
def test_too_few_signatures_and_strangers_are_refused(keys):
    with pytest.raises(BundleError, match="expected"):
        open_sealed(seal(b"{}", TYPE, keys), TYPE, trust_in(A, B, threshold=2), "It")


def test_a_strangers_signature_spoils_enough_good_ones():
    trust = trust_in(A, B)
    open_sealed(seal(b"{}", TYPE, [A]), TYPE, trust, "It")
    with pytest.raises(BundleError, match=f"signature of key '{ID[C][:12]}'"):
        open_sealed(seal(b"{}", TYPE, [A, C]), TYPE, trust, "It")


def test_a_wrong_signature_spoils_enough_good_ones():
    other = json.loads(seal(b"other", TYPE, [B]))["signatures"][0]
    sealed = changed(seal(b"{}", TYPE, [A]), lambda value: value["signatures"].append(other))
    sealed = changed(sealed, lambda value: value["signatures"].sort(key=lambda row: row["keyid"]))
    with pytest.raises(BundleError, match=f"wrong signature of key {ID[B][:12]}"):
        open_sealed(sealed, TYPE, trust_in(A, B), "It")


CHANGES = {
    "a signature twice": lambda value: value["signatures"].append(value["signatures"][0]),
    "another order": lambda value: value["signatures"].reverse(),
    "a field more": lambda value: value.update(note="hello"),
    "a field less": lambda value: value.pop("payload"),
    "a field of a signature more": lambda value: value["signatures"][0].update(alg="none"),
    "another type": lambda value: value.update(payloadType="application/json"),
    "base64 with a line end": lambda value: value.update(payload=value["payload"] + "\n"),
    "base64 with loose bits": lambda value: value.update(payload=value["payload"].replace("Q=", "R=")),
    "base64 for the web": lambda value: value["signatures"][0].update(
        sig=base64.urlsafe_b64encode(b"\xff" * 64).decode()
    ),
    "a number as payload": lambda value: value.update(payload=1),
    "signatures by name": lambda value: value.update(signatures={ID[A]: "x"}),
    "a key id of another type": lambda value: value["signatures"][0].update(keyid=None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_envelope_with_other_fields_is_refused(change):
    sealed = seal(b'{"a":1}', TYPE, [A, B])
    other = changed(sealed, change)
    assert other != sealed
    with pytest.raises(BundleError):
        open_sealed(other, TYPE, trust_in(A, B), "It")


@pytest.mark.parametrize(
    "spelled",
    [
        b'{"a": 1}',
        b'{"a":1}\n',
        b'{"b":1,"a":1}',
        b'{"a":1,"a":1}',
        b'{"a":1.0e0}',
        b'{"a":"\\u0041"}',
        '{"a":"é"}'.encode(),
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":' + b"1" * 5000 + b"}",
        b"[" * 100_000,
        b"\xff",
        b"",
    ],
    ids=lambda spelled: repr(spelled[:12]),
)
def test_json_in_another_spelling_is_refused(spelled):
    with pytest.raises(BundleError, match="canonical JSON"):
        read_canonical(spelled, "It")


def test_an_envelope_of_white_space_or_of_too_many_bytes_is_refused():
    sealed = seal(b"{}", TYPE, [A])
    with pytest.raises(BundleError, match="another spelling of its JSON at byte 0"):
        read_envelope(b" " + sealed, TYPE, "It")
    with pytest.raises(BundleError, match="expected at most"):
        read_envelope(sealed + b" " * 2**20, TYPE, "It")
    with pytest.raises(BundleError, match="expected at most"):
        seal(b"x" * 2**20, TYPE, [A])


def test_trust_moves_from_one_to_three_and_a_removed_key_counts_no_more():
    first = trust_in(A, B, threshold=1)
    to_second = seal_next_trust(first, [A, B], add=[C.public_key()], threshold=2)
    second = next_trust(first, to_second)
    assert (second.version, second.threshold, set(second.keys)) == (2, 2, {ID[A], ID[B], ID[C]})
    to_third = seal_next_trust(second, [A, B, C], remove=[ID[A]])
    third = next_trust(second, to_third)
    assert set(third.keys) == {ID[B], ID[C]}
    open_sealed(seal(b"{}", TYPE, [A, B]), TYPE, second, "It")
    with pytest.raises(BundleError, match=f"signature of key '{ID[A][:12]}'"):
        open_sealed(seal(b"{}", TYPE, [A, B, C]), TYPE, third, "It")
    for wrong, sealed in ((first, to_third), (second, to_second), (third, to_second)):
        with pytest.raises(BundleError, match="one after the other"):
            next_trust(wrong, sealed)


@pytest.mark.parametrize(
    ("signing", "says"),
    [
        ((C, D), "0 signatures by keys of trust 1, expected 2"),
        ((A, C, D), "1 signatures by keys of trust 1, expected 2"),
        ((A, B), "0 signatures by keys of trust 2, expected 2"),
        ((A, B, C), "1 signatures by keys of trust 2, expected 2"),
    ],
    ids=["the new alone", "one of the old", "the old alone", "one of the new"],
)
def test_old_and_new_keys_both_have_to_sign_the_next_trust(signing, says):
    trust = trust_in(A, B, threshold=2)
    change = {"add": [C.public_key(), D.public_key()], "remove": [ID[A], ID[B]]}
    with pytest.raises(BundleError, match=says):
        seal_next_trust(trust, signing, **change)
    new = trust_in(C, D, threshold=2, version=2)
    with pytest.raises(BundleError, match=says):
        next_trust(trust, seal(dump_trust(new), TRUST_TYPE, signing))
    assert next_trust(trust, seal_next_trust(trust, [A, B, C, D], **change)) == new


def test_a_key_that_is_neither_old_nor_new_spoils_the_next_trust():
    trust = trust_in(A)
    with pytest.raises(BundleError, match=f"signature of key '{ID[D][:12]}'"):
        seal_next_trust(trust, [A, D], add=[B.public_key()])


def test_a_bundles_envelope_is_no_trust_and_the_other_way_round():
    new = trust_in(A, B, version=2)
    with pytest.raises(BundleError, match="has type"):
        next_trust(trust_in(A), seal(dump_trust(new), TYPE, [A]))


def test_a_change_that_is_none_and_a_key_that_is_not_there_are_refused():
    with pytest.raises(BundleError, match="expected a change"):
        seal_next_trust(trust_in(A), [A], add=[A.public_key()])
    with pytest.raises(BundleError, match="has no key"):
        seal_next_trust(trust_in(A), [A], remove=[ID[B]])
    with pytest.raises(BundleError, match="keys"):
        seal_next_trust(trust_in(A), [A], remove=[ID[A]])


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 3},
        {"threshold": 0},
        {"threshold": True},
        {"threshold": "1"},
        {"version": 0},
        {"version": 1.5},
        {"keys": {}},
        {"keys": {ID[A]: base64.b64encode(B.public_key().public_bytes_raw()).decode()}},
        {"keys": {ID[A]: "eA=="}},
        {"keys": {ID[A]: "!"}},
        {"note": "hello"},
    ],
    ids=str,
)
def test_a_trust_that_makes_no_sense_is_refused(tmp_path, change):
    path = tmp_path / "trust.json"
    path.write_bytes(canonical(trust_in(A, B).model_dump() | change))
    with pytest.raises(BundleError, match="Trust"):
        read_trust(path)


def test_a_trust_file_comes_back_also_with_a_line_end(tmp_path):
    path, trust = tmp_path / "trust.json", trust_in(A, B, threshold=2)
    path.write_bytes(dump_trust(trust) + b"\n")
    assert read_trust(path) == trust
    path.write_bytes(dump_trust(trust)[:-1] + b',"version":7}')
    with pytest.raises(BundleError, match="another spelling"):
        read_trust(path)
    with pytest.raises(BundleError, match="--trust"):
        read_trust(tmp_path / "none.json")


def test_signers_are_those_of_the_envelope():
    envelope = read_envelope(seal(b"{}", TYPE, [A, B]), TYPE, "It")
    keys = {ID[each]: each.public_key() for each in (A, B, C)}
    assert signers(envelope, keys, "It") == {ID[A], ID[B]}


@pytest.fixture
def stillhouse(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_KEY_PASSPHRASE", SECRET.decode())
    monkeypatch.setenv("STILLHOUSE_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        return CliRunner().invoke(app, words)

    return run


def test_the_commands_make_list_and_rotate_keys(tmp_path, stillhouse):
    folder = tmp_path / "keys"
    assert stillhouse("keys", "new", "office", "night").exit_code == 0
    assert mode(folder) == 0o700
    assert mode(folder / "office.pem") == 0o600
    first = read_trust(folder / "trust.json")
    assert (first.version, first.threshold, len(first.keys)) == (1, 1, 2)

    more = stillhouse("keys", "new", "spare")
    assert "keys rotate --add spare" in more.output
    assert read_trust(folder / "trust.json") == first
    assert stillhouse("keys", "rotate", "--add", "spare", "--remove", "office", "--threshold", "2").exit_code == 0
    second = read_trust(folder / "trust.json")
    assert next_trust(first, (folder / "trust-2.dsse.json").read_bytes()) == second
    assert second.threshold == 2
    rows = {line.split("│")[1].strip(): line for line in stillhouse("keys", "list").output.splitlines() if "│" in line}
    assert "no" in rows["office"].split("│")[3]
    assert "yes" in rows["spare"].split("│")[3]
    assert "encrypted" in rows["spare"]


def test_a_rotation_that_was_cut_off_is_ended_by_doing_it_again(tmp_path, stillhouse):
    folder = tmp_path / "keys"
    stillhouse("keys", "new", "office")
    before = (folder / "trust.json").read_bytes()
    stillhouse("keys", "new", "spare")
    stillhouse("keys", "rotate", "--add", "spare")
    after = (folder / "trust.json").read_bytes()
    (folder / "trust.json").write_bytes(before)
    assert stillhouse("keys", "rotate", "--add", "spare").exit_code == 0
    assert (folder / "trust.json").read_bytes() == after
    (folder / "trust.json").write_bytes(before)
    other = stillhouse("keys", "rotate", "--add", "spare", "--threshold", "2")
    assert isinstance(other.exception, BundleError)
    assert (folder / "trust.json").read_bytes() == before


@pytest.mark.parametrize(
    "words",
    [
        ("keys", "new", "../office"),
        ("keys", "new", "a/b"),
        ("keys", "new", "office", "--threshold", "2"),
        ("keys", "rotate", "--add", "nobody"),
        ("keys", "list"),
    ],
    ids=" ".join,
)
def test_commands_that_cannot_be_right_write_nothing(tmp_path, stillhouse, words):
    done = stillhouse(*words)
    assert isinstance(done.exception, BundleError) or "no keys" in done.output
    assert not list(tmp_path.iterdir())


def test_without_variable_and_terminal_no_key_is_made(tmp_path, stillhouse, monkeypatch):
    monkeypatch.delenv("STILLHOUSE_KEY_PASSPHRASE")
    done = stillhouse("keys", "new", "office")
    assert isinstance(done.exception, BundleError)
    assert "STILLHOUSE_KEY_PASSPHRASE" in str(done.exception)
    assert not list((tmp_path / "keys").glob("*"))
    assert stillhouse("keys", "new", "office", "--unencrypted").exit_code == 0
    assert "NOT ENCRYPTED" in stillhouse("keys", "list").output


def test_the_model_of_a_trust_has_no_defaults():
    assert all(field.is_required() for field in Trust.model_fields.values())
