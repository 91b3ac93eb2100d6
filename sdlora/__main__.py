"""`python -m sdlora`: the command that is installed under this name. The library itself has none."""

from importlib.metadata import entry_points


def main() -> None:
    """Start the command, or say that it is not installed."""
    found = entry_points(group="console_scripts", name="sdlora")
    if not found:
        raise SystemExit(
            "python -m sdlora: no command of that name is installed; install the package with pip"
        )
    next(iter(found)).load()()


if __name__ == "__main__":
    main()
