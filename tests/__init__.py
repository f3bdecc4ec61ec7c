"""A folder of tests per room of relneuron/, named after its modules; what belongs to none is here.

kit/ has what several files use (studies, models, commands, processes that are killed), fuzz/ the
fuzzer, conftest.py the fixtures. `make test` runs all of it.
"""
