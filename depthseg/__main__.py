"""`python -m depthseg` is the console script `depthseg`."""

from depthseg.cli import main

if __name__ == "__main__":
    main()
