"""Settings are read once, and a wrong one ends the start with its name and its fix."""

from __future__ import annotations

import copy
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakes import cheaply
from vllm_edits.edit_store import EditStore
from vllm_edits.edit_store.errors import EditsError, SettingsError
from vllm_edits.edit_store.signing import SigningKey
from vllm_edits.plugin.cli.setting_option import assigned
from vllm_edits.plugin.open_store import open_reader
from vllm_edits.server_config.settings import NOT_COMPILED, CompiledSettings, EditSettings, Reserve, read_settings

RESERVE = {"kind": "low_rank", "site": "layers.*.mlp.out", "rank": 4}


def read(**values: Any) -> EditSettings:
    return read_settings({"edits": {"store": "/srv/store", **values}})


def test_compiled_code_is_kept_by_the_settings_that_it_depends_on() -> None:
    """vLLM's key of it is JSON of what stands in the additional config. Read as settings, it is still all of them."""
    given = {"store": "/srv/store", "slots": 4, "poll_seconds": 9.0, "reserve": "standard"}
    shown = CompiledSettings(given, scopes=2, reserve=[RESERVE])
    assert json.loads(json.dumps({"edits": shown})) == {"edits": {"slots": 4, "reserve": [RESERVE], "scopes": 2}}
    for each in (shown, copy.deepcopy(shown), CompiledSettings(shown, scopes=3)):
        assert read_settings({"edits": each}) == read(slots=4, poll_seconds=9.0, reserve="standard")


def test_every_setting_is_said_to_be_compiled_or_not() -> None:
    compiled = {"slots", "reserve", "scopes", "weights_reserve", "inner_load_format"}
    assert EditSettings.model_fields.keys() == compiled | NOT_COMPILED
    assert not compiled & NOT_COMPILED


def test_good_settings_are_read_with_their_defaults() -> None:
    """Positive control, and the defaults an operator relies on."""
    assert read(slots=4, reserve=[RESERVE]) == EditSettings(
        store="/srv/store",
        slots=4,
        reserve=(Reserve(kind="low_rank", site="layers.*.mlp.out", rank=4),),
        default_tag="prod",
        poll_seconds=2.0,
        admin_token_file=None,
        inner_load_format="auto",
    )
    assert (read().slots, read().reserve, read().admin_token_file) == (16, ("promoted",), None)


def test_every_setting_has_a_line_of_help() -> None:
    for model in (EditSettings, Reserve):
        assert all(field.description for field in model.model_fields.values())


@pytest.mark.parametrize(
    ("setting", "known"),
    [
        ("slot", "slots"),
        ("poll_second", "poll_seconds"),
        ("default_tags", "default_tag"),
        ("admin_token", "admin_token_file"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_known(setting: str, known: str) -> None:
    with pytest.raises(SettingsError, match=rf"edits\.{setting}: unknown setting\. Did you mean .*'{known}'"):
        read(**{setting: 1})


def test_an_unknown_setting_like_no_other_is_refused_with_all_known() -> None:
    with pytest.raises(
        SettingsError,
        match=r"Known: store, slots, reserve, reserve_headroom, scopes, grow, grow_bytes, probes, default_tag",
    ):
        read(zzz=1)


def test_an_unknown_field_of_a_reservation_names_the_fields_of_a_reservation() -> None:
    with pytest.raises(SettingsError, match=r"edits\.reserve\.0\.ranks: unknown setting\. Did you mean 'rank'"):
        read(reserve=[{**RESERVE, "ranks": 2}])


def test_one_profile_is_a_list_of_one() -> None:
    assert read(reserve="standard") == read(reserve=["standard"])
    assert read(reserve=None) == read(reserve="promoted") == read()
    mixed = read(reserve=["standard", RESERVE, "promoted"])
    assert (mixed.profiles, mixed.entries) == (("standard", "promoted"), (Reserve.model_validate(RESERVE),))
    assert (read(reserve=[RESERVE]).profiles, read(reserve=[]).entries) == ((), ())


def test_an_unknown_profile_is_refused_with_the_nearest_and_all_that_there_are() -> None:
    """With all other problems of the list at once."""
    with pytest.raises(SettingsError) as refusal:
        read(reserve=["standart", "zzz", "all", {**RESERVE, "ranks": 2}, {**RESERVE, "rank": 0}])
    known = "Profiles: promoted, standard, all. Give several profiles, or entries, as a list"
    assert str(refusal.value).splitlines()[1:] == [
        f"  - edits.reserve.0: unknown profile 'standart'. Did you mean 'standard'? {known}",
        f"  - edits.reserve.1: unknown profile 'zzz'. {known}",
        "  - edits.reserve.3.ranks: unknown setting. Did you mean 'rank' or 'reads'?",
        "  - edits.reserve.4.rank: Input should be greater than or equal to 1, found 0",
    ]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("reserve=standard", ("standard",)),
        ('reserve="all"', ("all",)),
        ("reserve=null", ("promoted",)),
        (f'reserve=["standard", {json.dumps(RESERVE)}]', ("standard", Reserve.model_validate(RESERVE))),
    ],
)
def test_profiles_on_the_command_line(option: str, expected: tuple[Any, ...]) -> None:
    """`--set` reads JSON, and what is none as text."""
    assert read_settings({"edits": assigned("/srv/store", [option])}).reserve == expected
    with pytest.raises(SettingsError, match=r"unknown profile 'promoted,standard'\. Did you mean .*as a list"):
        read_settings({"edits": assigned("/srv/store", ["reserve=promoted,standard"])})


def test_all_problems_come_at_once() -> None:
    """An operator mends everything in one go."""
    with pytest.raises(SettingsError) as refusal:
        read(slots=0, poll_seconds=0, colour="red", reserve=[{"kind": "magic", "site": "x"}])
    for wrong in ("edits.slots", "edits.poll_seconds", "edits.colour", "edits.reserve.0.kind"):
        assert str(refusal.value).count(wrong) == 1


@pytest.mark.parametrize(
    ("setting", "good", "bad"),
    [
        ("slots", [1, 4096], [0, -1, 4097, 1.5, "many", None]),
        ("poll_seconds", [0.05, 2, 3600], [0.04, 0, -1, 3601, math.inf, math.nan, "soon", None]),
        ("store", ["/srv/store", "memory://x"], ["", None, 7]),
        ("default_tag", ["prod", "beta-2"], ["", "Prod", "../x", "a/b", "prod\n", None]),
        (
            "reserve",
            [None, [], [RESERVE], "all", ["standard"], ["promoted", RESERVE, "standard"]],
            [
                RESERVE,
                "",
                "low_rank",
                ["all", None],
                [["all"]],
                7,
                [{**RESERVE, "rank": 0}],
                [{**RESERVE, "rank": 513}],
            ],
        ),
        ("reserve_headroom", [1, 1.5, 16], [0.99, 0, -1, 16.01, math.inf, math.nan, "much", None]),
        ("admin_token_file", [None, "/run/token"], [7, True]),
    ],
)
def test_values_have_bounds(setting: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        read(**{setting: value})
    for value in bad:
        with pytest.raises(SettingsError, match=rf"edits\.{setting}"):
            read(**{setting: value})


def test_a_default_tag_that_reads_as_a_version_is_refused() -> None:
    """Every bare variant name would be looked up as a digest."""
    with pytest.raises(SettingsError):
        read(default_tag="deadbeef")


def test_a_missing_store_is_named() -> None:
    with pytest.raises(SettingsError, match=r"edits\.store: Field required"):
        read_settings({"edits": {}})


@pytest.mark.parametrize("config", [None, {}, {"edits": None}, {"edits": [1]}, {"edit": {"store": "x"}}, "edits", []])
def test_a_config_without_settings_is_refused_with_an_example(config: Any) -> None:
    with pytest.raises(SettingsError, match=r"Start with: --additional-config"):
        read_settings(config)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read().slots = 3  # type: ignore[misc]


ROOT = Path(__file__).parents[2]


def test_every_example_configuration_is_accepted() -> None:
    """By the same reader that the server starts with."""
    examples = list((ROOT / "server_config/examples").glob("*.yaml"))
    assert examples
    for path in examples:
        config = yaml.safe_load(path.read_text())
        assert config["load-format"] == "edits"
        assert read_settings(config["additional-config"]).slots > 0


names = st.sampled_from([*EditSettings.model_fields, *Reserve.model_fields, "zzz"])
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)


@cheaply
@given(junk)
def test_whatever_is_written_there_is_read_or_refused(value: Any) -> None:
    """Nothing an operator can write ends in another error than SettingsError."""
    with suppress(SettingsError):
        read_settings({"edits": value})


def test_only_the_process_that_appends_reads_the_private_key(tmp_path: Path) -> None:
    """A worker opens the same store with the same settings, and the key's file need not even be there for it."""
    EditStore(str(tmp_path / "store"), create=True)
    key = tmp_path / "key.pem"
    settings = EditSettings(store=str(tmp_path / "store"), signing_key_file=str(key))
    with pytest.raises(EditsError, match=r"key\.pem"):
        open_reader(settings, signs=True)
    SigningKey.generate().save(key)
    assert open_reader(settings, signs=True).writable().signs
    key.unlink()
    assert not open_reader(settings).writable().signs
