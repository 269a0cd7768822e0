"""`python -m hardy` is the command `hardy`."""

from hardy.cli.main import run

if __name__ == "__main__":
    run()
