"""`python -m llm` lists the verbs."""

from llm import cli


def main(argv: list[str]) -> None:
    """Prints each verb with its purpose."""
    cli.parser("", "Lists the verbs.").parse_args(argv)
    print("python -m llm.VERB --help says more of each:\n")
    print(cli.table([(f"llm.{verb}", purpose) for verb, purpose in cli.VERBS.items()]))


if __name__ == "__main__":
    cli.run(main)
