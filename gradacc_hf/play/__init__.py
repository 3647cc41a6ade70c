"""`gradacc play`: a page on which gradacc's own loop trains a small model, shown step by step.

toy_tasks.py     data and models
loops.py         the loops: gradacc's own, and one with each mistake
model_runner.py  a model with its optimizer
session.py       one training run, as plain data; it does not depend on the page
workers.py       one process for each run
sessions.py      what clicks in each browser session do
drawing.py       the pictures, as HTML
page.py          the page, with Gradio
"""
