"""The page of runs: one HTML file that asks for nothing else. Its script reads the data that the file holds.

documents.py    what each run answered to each document
overview.py     runs, settings, scores, comparisons
embedding.py    data, script and style in one file
rendering.py    the file
template.html, page.css, page.js
"""
