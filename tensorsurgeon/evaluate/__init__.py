"""What models answer: engines that run them, suites of what to ask, measures of the answers, records of it all.

engine.py        the interface that all engines have
choosing.py      which engine runs a model
engines/         vLLM in this process, a server, transformers
serving.py       a vLLM server of our own, and why it did not start
digest.py        which bytes were asked
tokens.py        texts as tokens, chats, and what each token spells
suite.py suites/ what is asked, as YAML
pictures.py      pictures in prompts, as a model's processor puts them
suite_parts.py   each kind of thing that can be asked
questionnaire.py a suite in the tokens of a model
labels.py        the tokens that say yes, no, and other words
probing.py       what a probe measures of the next token
measures.py      probabilities, entropies, divergences, perplexities, in float64
bilingual.py     arithmetic in English and Chinese from a seed
grading.py       right or wrong, where the answer stands, and in which script
asking.py        a suite put to an engine: records, which are plain dicts
tables.py        records as tables
study.py         a study of many variants, as YAML
sweeping.py      a study carried out
installing.py    one model after the other in an engine
described.py     what a record says of a variant
ledger.py        the records of a study on disk
records.py       the kinds of records
results.py       all of a study read back
outcomes.py outcome_measures.py layer_changes.py   what became of each variant
result_tables.py result_charts.py result_words.py  what is told of that
benchmarks.py    tasks of lm-evaluation-harness on the same engines
"""
