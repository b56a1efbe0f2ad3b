"""What stock wikitext does with a document's log-likelihood."""


def process_results(doc, results):
    (log_likelihood,) = results
    words, size = len(doc["page"].split()), len(doc["page"].encode())
    return {
        "word_perplexity": (log_likelihood, words),
        "byte_perplexity": (log_likelihood, size),
        "bits_per_byte": (log_likelihood, size),
    }
