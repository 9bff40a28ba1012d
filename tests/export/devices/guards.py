"""Every guard of devices taken out, one at a time: which line, what is left without it, and the test that must fail.

A guard that no test needs is not known to work. ``test_guards.py`` changes a copy of the project, never the project.
Here are those of the agent; those of pulls, pushes and rollouts are in ``guards_fleet.py``.
"""

from dataclasses import dataclass

AGENT = "export/devices/agent/"
SERVER = "export/devices/"
TESTS = "tests/export/devices/"
MORE, STATE = "test_guards_more.py::", "test_guards_more_state.py::"


@dataclass(frozen=True)
class Mutant:
    """One guard removed."""

    name: str
    """The guard, in words."""
    file: str
    old: str
    """Occurs exactly once in the file."""
    new: str
    test: str
    """Node id; of a test with parameters, all of them or one."""


def agent(file: str, *rows: tuple[str, str, str, str]) -> list[Mutant]:
    return [Mutant(name, AGENT + file, old, new, TESTS + test) for name, old, new, test in rows]


def server(file: str, *rows: tuple[str, str, str, str]) -> list[Mutant]:
    return [Mutant(name, SERVER + file, old, new, TESTS + test) for name, old, new, test in rows]


CHANGED = "test_agent_package.py::test_every_changed_byte_is_noticed_before_anything_is_unpacked[2000-0]"
ARCHIVE = "test_agent_package.py::test_an_archive_that_is_not_what_was_signed_is_refused"
NAMES = "test_device_faults.py::test_a_path_that_is_not_plain_is_refused_where_statement_and_archive_agree_on_it"
SAYS = "test_agent_package.py::test_a_signed_statement_that_says_nonsense_is_refused"
FORM = MORE + "test_an_envelope_in_another_form_is_refused"

FILE = [
    *agent(
        "package.py",
        (
            "length of the whole file",
            "if facts.st_size != whole:",
            "if False:",
            MORE + "test_a_file_longer_than_its_signed_length_is_refused_by_that",
        ),
        ("digest of the whole file", 'if digest_of(file) != content["sha256"]:', "if False:", CHANGED),
        (
            "a plain file",
            "if not stat.S_ISREG(facts.st_mode):",
            "if False:",
            "test_agent_package.py::test_a_pipe_and_a_folder_are_no_bundle",
        ),
        (
            "size of the envelope",
            "if not 0 < size <= MAX_ENVELOPE:",
            "if False:",
            MORE + "test_an_endless_envelope_is_refused_though_it_is_signed",
        ),
        (
            "digest of each member, as the disk gives it back",
            'if found != each["sha256"]:',
            "if False:",
            "test_agent_package.py::test_what_the_disk_gives_back_is_verified",
        ),
        (
            "reading back after unpacking",
            "durable.flush_folder(slot.parent)\n    verify(slot, bundle.statement)",
            "durable.flush_folder(slot.parent)",
            ARCHIVE + "[other bytes]",
        ),
        (
            "members are those listed",
            'if [info.filename for info in infos] != [each["path"] for each in files]:',
            "if False:",
            ARCHIVE + "[a member more]",
        ),
        (
            "members are stored, not compressed",
            "if info.compress_type != zipfile.ZIP_STORED or ",
            "if ",
            ARCHIVE + "[compressed]",
        ),
        (
            "a member becomes a plain file, whatever it says it is",
            '_copy(member, place, each["length"])',
            "(os.symlink(member.read(), place) if info.external_attr >> 16 & 0o170000 == 0o120000"
            ' else _copy(member, place, each["length"]))',
            MORE + "test_a_member_that_says_it_is_a_link_becomes_a_plain_file",
        ),
        ("parts of a path are plain", "all(PART.fullmatch(part) for part in parts)", "True", NAMES + "[../evil]"),
        ("depth of a path", "0 < len(parts) <= 4", "0 < len(parts)", NAMES + "[a/b/c/d/e]"),
        ("name of the statement is reserved", " and value != STATEMENT", "", NAMES + "[statement.json]"),
        (
            "paths differ in more than case",
            " or len({path.lower() for path in paths}) != len(paths)",
            "",
            SAYS + "[a case clash]",
        ),
        (
            "no path inside another",
            "if folders & {path.lower() for path in paths} or ",
            "if ",
            SAYS + "[a file that is a folder too]",
        ),
        (
            "number of files",
            "or not 0 < len(paths) <= MAX_FILES:",
            "or not paths:",
            MORE + "test_more_files_than_an_agent_takes_are_refused",
        ),
        ("bytes of all files", " or sum(files.values()) > MAX_BYTES", "", SAYS + "[a huge file]"),
        ("no field that is not known", "set(value) != set(shape)", "set(value) < set(shape)", SAYS + "[unknown field]"),
        (
            "bytes of members are flushed",  # fadvise begins to write them, too, but waits for nothing
            'os.fsync(file.fileno())\n        if hasattr(os, "posix_fadvise"):',
            "if False:",
            STATE + "test_an_unpacked_slot_outlives_a_power_cut",
        ),
    ),
    *agent(
        "envelope.py",
        (
            "threshold of signatures",
            "if len(signatures) < self.threshold:",
            "if len(signatures) < 1:",
            MORE + "test_one_signature_is_not_enough_where_two_are_asked_for",
        ),
        ("unsigned", "if len(signatures) < self.threshold:", "if False:", FORM + "[unsigned-0 signatures, expected 1]"),
        (
            "no signature twice",
            'if signatures and row["keyid"] <= max(signatures):',
            "if False:",
            FORM + "[twice-twice]",
        ),
        ("canonical JSON", "    if not same:", "    if False:", FORM + "[spaced-canonical]"),
        (
            "one form of base64",
            "if base64.b64encode(data).decode() != text:",
            "if False:",
            FORM + "[loose_base64-one form of base64]",
        ),
        (
            "signatures are of trusted keys",
            'raise Refused("signature", f"{what} is signed by \'{name[:12]}\', expected a trusted key.")',
            "continue",
            MORE + "test_a_stranger_beside_a_trusted_key_is_refused",
        ),
        ("signatures are right", "if not is_signed(self.keys[name], message, signature):", "if False:", CHANGED),
    ),
]

TRUSTED = MORE + "test_trust_that_does_not_follow_is_refused"
TRUST = agent(
    "envelope.py",
    (
        "new trust has the next version",
        "if after.version != self.version + 1:",
        "if False:",
        TRUSTED + "[data1-expected 2]",
    ),
    (
        "new trust is never older",
        "if after.version != self.version + 1:",
        "if after.version > self.version + 1:",
        TRUSTED + "[data0-expected 2]",
    ),
    (
        "new trust is signed by enough keys of the trust before",
        '((self, "before"), (after, "itself"))',
        '((after, "itself"),)',
        TRUSTED + "[data3-by the trust before]",
    ),
    (
        "new trust is signed by enough of its own keys",
        '((self, "before"), (after, "itself"))',
        '((self, "before"),)',
        TRUSTED + "[data5-by the trust itself]",
    ),
    (
        "every signature under new trust is right",
        "if name in known and not is_signed(known[name], message, text)",
        "if False",
        MORE + "test_a_wrong_signature_under_new_trust_is_refused_though_there_are_enough_others",
    ),
    (
        "only keys of both sign new trust",
        "for name, text in signatures.items() if name not in known]",
        "for name, text in signatures.items() if False]",
        TRUSTED + "[data6-expected known keys]",
    ),
    ("trust is no bundle", 'if value["payloadType"] != kind:', "if False:", TRUSTED + "[data7-has type]"),
)

PROVES = "test_agent_device.py::test_a_model_that_does_not_prove_itself_never_becomes_active"
ANSWERS = MORE + "test_answers_are_compared_in_numbers_in_class_and_in_shape"
FIELDS = "test_agent_device.py::test_a_bundle_for_other_devices_is_refused_with_the_field_that_differs"
LIMIT = MORE + "test_every_limit_counts"
CRASHING = "test_agent_device.py::test_a_server_that_keeps_crashing_is_given_the_model_before"
FITS = [
    *agent(
        "facts.py",
        (
            "version of the runtime",
            'if version is None or not satisfies(version, variant["runtime_versions"]):',
            "if version is None:",
            FIELDS + "[runtime_versions->=99-expected >=99]",
        ),
        (
            "instruction set, GPU and system",
            "if variant[field] is not None and device[field] != variant[field]:",
            "if False:",
            FIELDS + "[isa-arm-isa is x86, expected arm]",
        ),
        (
            "features of the processor",
            "    if missing:",
            "    if False:",
            FIELDS + "[cpu_features-value4-expected ['dot_product']]",
        ),
        (
            "memory of the device",
            "if least is not None and there is not None and there < least:",
            "if False:",
            FIELDS + "[min_memory_mib-1000000000-at least 1000000000]",
        ),
    ),
    *agent(
        "selftest.py",
        (
            "golden answers, in numbers",
            "if not np.allclose(outputs, wanted, rtol",
            "if False and not np.allclose(outputs, wanted, rtol",
            ANSWERS + "[numbers]",
        ),
        (
            "golden answers, in class",
            "if (outputs.argmax(axis=1) != wanted.argmax(axis=1)).any():",
            "if False:",
            ANSWERS + "[class]",
        ),
        ("golden answers, in shape", "if outputs.shape != wanted.shape:", "if False:", ANSWERS + "[shape]"),
        ("finite answers", "if not np.isfinite(outputs).all():", "if False:", PROVES + "[not_finite-None-not finite]"),
        ("latency, median", '("p50_ms", "ms"), ', "", LIMIT + "[p50_ms]"),
        ("latency, 95th percentile", '("p95_ms", "ms"), ', "", LIMIT + "[p95_ms]"),
        ("memory of the model", ', ("memory_mib", "MiB")', "", LIMIT + "[memory_mib]"),
        ("time to load", ', ("load_s", "s")):', ",):", LIMIT + "[startup_s]"),
        (
            "a self-test that hangs is ended",
            "process.communicate(timeout=seconds)",
            "process.communicate()",
            "test_device_faults.py::test_a_model_that_hangs_is_refused_when_its_time_is_over",
        ),
        (
            "a self-test that crashes is no success",
            "if process.returncode < 0:",
            "if False:",
            "test_device_faults.py::test_a_self_test_that_crashes_is_a_refusal_with_its_signal[SIGSEGV]",
        ),
    ),
]

TURNS = "test_agent_device.py::test_slots_take_turns_and_older_numbers_are_refused"
DEVICE = agent(
    "device.py",
    ("floor", 'if statement["seq"] <= lowest:', "if False:", TURNS),
    ("the floor is raised", 'durable.write_json(self.root / "floor.json", floor)', "pass", TURNS),
    (
        "date",
        "if last is not None and package.moment(last) < now:",
        "if False:",
        "test_agent_device.py::test_an_expired_bundle_is_refused_whatever_the_clock_says",
    ),
    (
        "the latest signed moment stands for a clock that is behind",
        'max(time.time(), floor["time"], package.moment(statement["created"]))',
        "time.time()",
        "test_agent_device.py::test_an_expired_bundle_is_refused_whatever_the_clock_says",
    ),
    (
        "not again what was refused before",
        "if refused and not again:",
        "if False:",
        PROVES + "[wrong_outputs-None-golden]",
    ),
    (
        "not again what was rolled back",
        "self._never_again(journal[\"digest\"], f\"{journal['code']}: {journal['text']}\")",
        "pass",
        STATE + "test_a_bundle_that_was_rolled_back_is_not_tried_again",
    ),
    (
        "test before the swap",
        'found = selftest.try_out(self.slot(slot), self.config["threads"])',
        "found = {}",
        PROVES + "[wrong_outputs-None-golden]",
    ),
    (
        "test after the swap",
        'found = selftest.try_out(self.current, self.config["threads"])',
        "found: dict[str, Any] = {}",
        "test_device_faults.py::test_a_model_that_is_damaged_between_its_tests_is_rolled_back",
    ),
    (
        "the server must answer with it",
        'found.update(self._probe(journal["digest"]))',
        "pass",
        "test_agent_serving.py::test_what_the_server_cannot_load_is_rolled_back_and_never_answers",
    ),
    (
        "journal before the swap",
        'self._journal("trial", tries=1,',
        'durable.point(self.current, f"slots/{slot}")\n            self._journal("trial", tries=1,',
        STATE + "test_what_was_swapped_before_a_kill_is_tested_and_committed_after_it",
    ),
    (
        "journal before unpacking",
        'self._journal("staging", slot=slot)',
        "pass",
        STATE + "test_what_was_unpacked_before_a_kill_is_erased_after_it",
    ),
    (
        "two tries",
        'elif state == "trial" and journal["tries"] >= TRIES:',
        "elif False:",
        "test_agent_device.py::test_a_trial_that_was_cut_short_is_made_once_more_and_then_given_up[2]",
    ),
    (
        "a crash loop gets the model before",
        "if len(recent) < CRASHES:",
        "if True:",
        CRASHING,
    ),
    (
        "starts far apart are no crash loop",
        "0 <= now - each[1] < CRASH_SECONDS",
        "True",
        STATE + "test_starts_that_are_far_apart_are_no_crashes",
    ),
    (
        "an orderly end is no crash",
        'no crash."""\n        with suppress(OSError):\n            durable.write_json(self.root / "starts.json", [])',
        'no crash."""',
        "test_agent_device.py::test_starts_after_an_orderly_end_are_no_crashes",
    ),
    (
        "a damaged slot is not gone back to",
        "package.verify(self.slot(other), good)",
        "pass",
        "test_agent_device.py::test_a_damaged_slot_is_not_gone_back_to",
    ),
    (
        "reserve on the disk",
        "if free < wanted:",
        "if False:",
        "test_agent_device.py::test_without_room_nothing_is_written",
    ),
    (
        "a slot that could not be filled is erased",
        "                durable.erase(self.slot(slot))\n                if not isinstance(error, OSError):",
        "                if not isinstance(error, OSError):",
        "test_disk_faults.py::test_a_disk_that_fills_up_leaves_the_old_model_and_room_for_the_next[unpacking]",
    ),
    (
        "one command at a time",
        "fcntl.flock(file, fcntl.LOCK_EX)",
        "pass",
        STATE + "test_two_commands_change_a_device_one_after_the_other",
    ),
    (
        "number of reports kept",
        "for path in self.reports()[:-MAX_REPORTS]:",
        "for path in self.reports()[:0]:",
        STATE + "test_reports_do_not_fill_the_disk",
    ),
    (
        "a report is forgotten after it was delivered",
        "                deliver(report)\n                sent += 1\n            path.unlink(missing_ok=True)",
        "                path.unlink(missing_ok=True)\n                deliver(report)\n                sent += 1",
        "test_agent_device.py::test_reports_wait_in_order_until_they_are_delivered",
    ),
)

MOMENT = STATE + "test_at_every_moment_a_name_stands_for_the_old_or_the_new"
CUT = STATE + "test_what_was_written_pointed_or_erased_outlives_a_power_cut"
DURABLE = agent(
    "durable.py",
    ("bytes are flushed before the rename", "        os.fsync(file.fileno())", "        pass", CUT),
    ("names are flushed", "        os.fsync(descriptor)", "        pass", CUT),
    ("files are written aside", 'aside = path.with_name(f".{path.name}.new")', "aside = path", MOMENT),
    (
        "the link is renamed over",
        "os.replace(aside, link)",
        "os.path.lexists(link) and os.unlink(link)\n    os.rename(aside, link)",
        MOMENT,
    ),
)

MUTANTS: tuple[Mutant, ...] = (*FILE, *TRUST, *FITS, *DEVICE, *DURABLE)
