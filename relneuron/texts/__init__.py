"""What is asked and read: relations and their prompts, knowledge, corpora; texts as tokens.

May import `artifact`. No model is loaded here. Begin with `facts.read_relations` for a study of
relations, with `sources.parse_sources` for a corpus: `feed`, `worker`, `windows` and `read` make
its windows.
"""
