"""What assembly needs besides contexts, loaded once: prompts, tokenizer, corpus."""

from streamsyn.assembly.assembler import Assembler
from streamsyn.assembly.prompts import SamplePrompts
from streamsyn.sections import AssemblySection


class Materials:
    """What samples are made with. Any number of assemblers may be made of it.

    Raises:
        ConfigError: Something that the configuration names cannot be used.
    """

    def __init__(self, section: AssemblySection) -> None:
        self._section = section
        self._prompts = SamplePrompts(section)

    def assembler(self, run_seed: int) -> Assembler:
        """One that has not seen a context yet."""
        return Assembler(self._section, run_seed, self._prompts)

    def fingerprint(self) -> dict[str, str]:
        """What shapes samples besides the configuration, such as packaged templates."""
        return self._prompts.fingerprint()
