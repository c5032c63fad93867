"""Plain help whose options and commands stand in groups by purpose, and which `-h` shows, too."""

from typing import Any

from typer.core import TyperCommand, TyperGroup

HELP = {"help_option_names": ["-h", "--help"]}


class Command(TyperCommand):
    """A command whose options are grouped by their `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, group by group; those without a group come last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                fallback = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or fallback, []).append(record)
        _write(formatter, groups)


class Group(TyperGroup):
    """Commands that are grouped by their `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, group by group, and the options."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                panel = getattr(command, "rich_help_panel", None)
                panel = panel if isinstance(panel, str) else "Commands"
                groups.setdefault(panel, []).append((name, command.get_short_help_str(limit=200)))
        records = [record for parameter in self.get_params(ctx) if (record := parameter.get_help_record(ctx))]
        _write(formatter, {**groups, "Options": records})


def _write(formatter: Any, groups: dict[str, list[tuple[str, str]]]) -> None:
    for title in sorted(groups, key="Options".__eq__):  # these last
        with formatter.section(title):
            formatter.write_dl(groups[title])
