"""The HTML page of runs: one file that loads nothing from a network. Its script reads the data that the file holds.

data.py         the documents with each run's scores, answers and denoising records
overview.py     runs, settings, scores, comparisons, charts
embedding.py    puts data, script and style into one file
rendering.py    makes the file from template.html, page.css and the scripts
documents.js    reads the data, and draws the table of documents
denoising.js    the opened document: answers, and the slider over denoising steps
page.js         address, controls, start
"""
