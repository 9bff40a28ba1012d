"""Guards of pulls, pushes, the registry and rollouts taken out, one at a time; see ``guards.py``."""

from tests.export.devices.guards import STATE, Mutant, agent, server

PULL = [
    *agent(
        "pull.py",
        (
            "versions of metadata are kept apart from tuf's files",
            "updater.refresh()\n        _keep_floor(device)",
            "updater.refresh()",
            "test_agent_pull.py::test_old_metadata_are_refused_after_a_power_cut_that_took_the_newer_ones",
        ),
        (
            "a part is gone on with only under the same entity tag",
            '**({"if-range": tag} if tag else {})',
            "",
            STATE + "test_a_part_of_another_file_is_not_gone_on_with",
        ),
        (
            "no encoded answer",
            'if response.headers.get("content-encoding", "identity") != "identity":',
            "if False:",
            "test_agent_pull.py::test_an_encoded_answer_is_not_taken_for_the_file",
        ),
        (
            "the range that was asked for",
            'if response.status == 206 and response.headers.get("content-range") != place:',
            "if False:",
            STATE + "test_a_range_that_was_not_asked_for_is_not_taken",
        ),
        (
            "an answer without a range begins at the start",
            "if have and response.status != 206:",
            "if False:",
            "test_agent_pull.py::test_a_server_without_ranges_is_asked_from_the_start",
        ),
        (
            "no more than was signed",
            "response.read1(min(CHUNK, length - have))",
            "response.read1(CHUNK)",
            "test_agent_pull.py::test_no_more_is_read_than_the_repository_signed",
        ),
        (
            "digest after the download",
            "if found != digest or have != length:",
            "if False:",
            STATE + "test_another_signed_bundle_than_the_one_ordered_is_refused",
        ),
        (
            "the order still stands after the download",
            "if _ordered(device, base)[0] != order:",
            "if False:",
            "test_agent_pull.py::test_an_order_that_is_taken_back_during_the_download_is_not_followed",
        ),
        (
            "an end of waiting for an answer that comes in drops",
            "    timer.start()\n",
            "",
            "test_network_faults.py::test_an_answer_whose_head_comes_in_drops_is_given_up_and_the_part_kept",
        ),
        (
            "what was cut off is not taken for the whole",
            "if late.is_set():  # what ended there only looks whole",
            "if False:",
            "test_network_faults.py::test_a_reply_that_comes_in_drops_is_not_waited_for[200 OK]",
        ),
        (
            "proof of a report",
            "hmac.new(secret.encode(), body,",
            'hmac.new(b"", body,',
            STATE + "test_a_report_is_proved_with_the_secret_of_its_device",
        ),
    ),
    *agent(
        "inbox.py",
        (
            "names of files handed in",
            "if any(not (NAME.fullmatch(each) or each.isdigit()) for each in rest):",
            "if False:",
            "test_agent_inbox.py::test_everything_else_is_refused_and_nothing_is_written[forget ../state.json]",
        ),
        (
            "a part goes on where it ended",
            "if offset != have:",
            "if False:",
            "test_agent_inbox.py::test_a_bundle_is_handed_in_in_parts_and_installed",
        ),
        (
            "room for what is handed in",
            "if room < 0:",
            "if False:",
            "test_disk_faults.py::test_what_is_handed_in_leaves_a_reserve_on_the_disk",
        ),
        (
            "what was refused is taken away",
            "            part.unlink(missing_ok=True)",
            "            pass",
            "test_agent_inbox.py::test_a_bundle_that_nobody_signed_is_refused_and_taken_away",
        ),
    ),
]

EDGES = "test_rollout.py::test_the_rule_at_its_edges"
ONE_LEASE = "test_registry.py::test_one_controller_at_a_time_and_the_next_when_it_is_dead[sqlite]"
FLEET = [
    *server(
        "registry.py",
        (
            "a report counts once",
            "if connection.execute(wanted.returning(reports_table.c.key)).first() is None:",
            "if connection.execute(wanted) is None:",
            "test_registry.py::test_a_report_counts_once[sqlite]",
        ),
        (
            "reports of strangers",
            'self._require(connection, str(report["device"]))',
            'self._device(connection, str(report["device"]))',
            "test_registry.py::test_reports_of_strangers_are_refused_and_of_other_bundles_change_no_rollout[sqlite]",
        ),
        (
            "one rollout of a model",
            "if other is not None:",
            "if False:",
            "test_registry.py::test_one_rollout_of_a_model_at_a_time[sqlite]",
        ),
        ("lease of one controller", 'rollouts_table.c.holder.in_(("", holder)),', "sa.true(),", ONE_LEASE),
        ("a lease ends", "rollouts_table.c.held_until < at,", "sa.false(),", ONE_LEASE),
        (
            "who has reported is neither ordered nor timed out",
            '                    placements_table.c.outcome.in_(("waiting", "ordered")),\n',
            "",
            "test_registry.py::test_who_reported_meanwhile_is_not_ordered_or_timed_out[sqlite]",
        ),
        (
            "chain of the log",
            'if row["digest"] != wanted or row["number"] != len(found) + 1:',
            "if False:",
            "test_registry.py::test_a_log_that_was_changed_is_noticed[sqlite-change]",
        ),
    ),
    *server(
        "rollout.py",
        (
            "one failure more than allowed",
            "if failed > policy.max_failures:",
            "if failed > policy.max_failures + 1:",
            EDGES + "[outcomes0-policy0-abort]",
        ),
        (
            "as many failures as allowed",
            "if failed > policy.max_failures:",
            "if failed >= policy.max_failures:",
            EDGES + "[outcomes2-policy2-order]",
        ),
        (
            "share of failures, at equality",
            "failed >= share * reported:",
            "failed > share * reported:",
            EDGES + "[outcomes4-policy4-abort]",
        ),
        (
            "share of failures, from enough reports on",
            "reported >= policy.min_reported and ",
            "",
            EDGES + "[outcomes5-policy5-order]",
        ),
        (
            "devices at it at the same time",
            "devices=tuple(waiting[:room])",
            "devices=tuple(waiting)",
            "test_rollout.py::test_no_more_devices_are_at_it_than_allowed",
        ),
        (
            "the deadline itself",
            "now >= each.ordered_at + _deadline(policy)",
            "now > each.ordered_at + _deadline(policy)",
            "test_rollout.py::test_a_silent_device_is_timed_out_at_its_deadline",
        ),
        (
            "a ring must be good enough",
            'counted["good"] < policy.min_success * counted["reported"]:',
            "False:",
            "test_rollout.py::test_a_ring_that_is_not_good_enough_opens_nothing",
        ),
        (
            "a ring that says nothing opens nothing",
            '    if not counted["reported"]:',
            "    if False:",
            "test_rollout.py::test_a_ring_of_which_nobody_reported_opens_nothing",
        ),
        (
            "a good ring is watched",
            "if ended is not None and now < ended",
            "if False and ended is not None and now < ended",
            "test_rollout.py::test_a_good_ring_is_watched_for_a_while",
        ),
    ),
    *server(
        "controller.py",
        (
            "orders of a controller that died are given again",
            'if rollout.state == "running" and names:',
            "if False:",
            "test_controller.py::test_a_controller_that_dies_anywhere_is_followed_by_another_and_nobody_installs_twice[2]",
        ),
        (
            "another controller is kept out",
            "    if not registry.hold(rollout_id, holder):\n        other = ",
            "    if False:\n        other = ",
            "test_controller.py::test_two_controllers_never_work_at_once",
        ),
        (
            "orders are taken back",
            "courier.withdraw(rollout, registry.devices(ordered))",
            "pass",
            STATE + "test_stopping_takes_back_the_orders_that_nobody_has_followed",
        ),
    ),
    *server(
        "push.py",
        (
            "key of the host",
            'known_hosts=asyncssh.import_known_hosts(f"[{host}]:{port} {device.host_key}"),',
            "known_hosts=None,",
            "test_push.py::test_another_host_key_than_known_is_refused",
        ),
        (
            "no host without a known key",
            " or not device.host_key:",
            ":",
            "test_push.py::test_without_a_known_host_key_nothing_is_tried",
        ),
        (
            "what was sent is not sent again",
            "file.seek(have)",
            "have = 0",
            "test_push.py::test_what_was_sent_is_not_sent_again",
        ),
    ),
    *server(
        "server.py",
        (
            "who sends a report proves it",
            "if not device.secret or not hmac.compare_digest(wanted, proof):",
            "if False:",
            "test_server.py::test_what_is_not_proven_or_cannot_be_read_changes_nothing",
        ),
        (
            "a report is of whom it says",
            'if report["device"] != name:',
            "if False:",
            "test_server.py::test_what_is_not_proven_or_cannot_be_read_changes_nothing",
        ),
        (
            "length of a report",
            'if int(request.headers.get("content-length") or MAX_REPORT + 1) > MAX_REPORT:',
            "if False:",
            "test_server.py::test_a_report_without_end_is_not_read",
        ),
    ),
    *server(
        "repository.py",
        (
            "no order for a bundle that is not published",
            "if order.bundle not in targets.signed.targets:",
            "if False:",
            STATE + "test_an_order_for_a_bundle_that_is_not_published_is_refused",
        ),
        (
            "no repository over another one",
            'if (folder / "metadata").exists():',
            "if False:",
            STATE + "test_a_repository_is_not_made_over_another_one",
        ),
        (
            "a new root is signed by the keys before",
            'for signer in [*before, *self.signers["root"]]:',
            'for signer in self.signers["root"]:',
            "test_agent_pull.py::test_a_device_that_slept_through_ten_rotations_of_all_keys_finds_its_way",
        ),
    ),
]

MUTANTS: tuple[Mutant, ...] = (*PULL, *FLEET)
