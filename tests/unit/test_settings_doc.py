"""The table of all settings: whole, and fresh."""

from libs.settings import AuthSettings, ClockSettings, LinkSettings, PostgresSettings
from libs.settings_doc import TARGET, all_groups, render


def test_every_setting_of_every_group_has_a_meaning() -> None:
    """A setting without a description would be an empty cell."""
    missing = [
        group.variable_of(name)
        for group in all_groups()
        for name, field in group.model_fields.items()
        if not field.description
    ]
    assert missing == []


def test_a_row_says_name_type_default_and_bounds() -> None:
    """In the units people type."""
    page = render([PostgresSettings, ClockSettings, LinkSettings, AuthSettings])
    assert "| `CARILLON_POSTGRES_URL` | secret | **required** |  |" in page
    assert "| `CARILLON_TEST_CLOCK` | on / off | `off` |  |" in page
    assert "| `CARILLON_LINK_SWEEP_INTERVAL` | duration | `1s` | 10ms to 1m |" in page
    assert "| `CARILLON_AUTH_MODE` | `none`, `tokens`, `jwt` | `none` |  |" in page


def test_no_two_settings_share_a_variable() -> None:
    """One would silently set the other."""
    names = [group.variable_of(name) for group in all_groups() for name in group.model_fields]
    assert sorted(set(names)) == sorted(names)


def test_the_page_in_the_repository_is_fresh() -> None:
    """Run `python -m libs.settings_doc` after changing a setting."""
    assert TARGET.read_text() == render(all_groups())
