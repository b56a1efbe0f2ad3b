"""Engines of other packages behind the protocol of `engines/types.py`.

jetengine/, lmdeploy/   an adapter each; its engine.py drives the other package
adapter.py              what every adapter does with the requests of a run
requests.py             which requests are refused, how they are grouped, where their answers end
options.py              options that all adapters take
config.py               config.json without the checkpoint's code
installed.py            which version of a package is installed, and what is missing beside it
processes.py            giving a GPU back
"""
