"""The command line `sdlora`, also `python -m pipelines`."""

import os


def main() -> None:
    """Hand the command to the warm process of `sdlora run` if there is one, else run it here."""
    if "SDLORA_WARM" in os.environ:
        import sys

        from pipelines.warm import ask

        status = ask(sys.argv[1:])
        if status is not None:
            raise SystemExit(status)
    from pipelines.cli import main

    main()


if __name__ == "__main__":
    main()
