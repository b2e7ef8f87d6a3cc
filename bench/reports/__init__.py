"""The parts of the pages and the pictures that ``bench/report.py`` draws from the rows."""
