"""Recipes: what the LLM is asked for a seed, and how its answers become a context.

    Draft -> Recipe.steps -> Request -> (worker, fleet) -> Completion -> ... -> Document or RejectedDraft

In reading order:
    recipe            the interface, and `BaseRecipe` for a recipe of your own
    registry          from `recipe.use` to a recipe, built-in or as `module:name`
    context           one document per draft, in one request; the conversation is shared with:
    instruction       seeds are documents; the LLM writes question and answer
    sections_recipe   a long document, written section by section
    manuscript        its state: length, places of facts, conversation
    chat_recipe       requests of your own, sent as they are
    prompt            a template as the first messages, with keys of shared prefixes; text that none uses
    parsing           documents, sections, headings and question-answer pairs in answers
    checks            the checks of a text and their reject reasons

Recipes do no I/O, so a test can drive one by hand. README.md shows how to write your own.
"""
