"""What the simulator's sentences are made of."""

from typing import Final


def _words(listed: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in listed.replace("\n", " ").split("|"))


TIMES: Final = _words(
    "In early spring|Before the second audit|During the long winter|After the harvest|By late evening|"
    "Once the ferry returned|Within a decade|On the third morning|Under the new charter|Shortly before noon|"
    "Following a dry summer|Over several seasons|At the annual meeting|Long after the flood|"
    "As the survey closed|In the final quarter"
)
ADJECTIVES: Final = _words(
    "narrow|patient|eastern|unfinished|quiet|municipal|weathered|ordinary|copper|forgotten|modest|coastal|reliable|"
    "distant|wooden|seasonal|curious|northern|fragile|annual|official|borrowed|luminous|practical|heavy|regional|"
    "amber|careful|abandoned|shallow|civic|portable|restored|tidal|woollen|private|mountain|early|granite|sober"
)
PEOPLE: Final = _words(
    "committee|engineers|archivists|teachers|surveyors|cooperative|curators|printers|volunteers|clerks|botanists|"
    "accountants|gardeners|merchants|sailors|masons|apprentices|farmers|guides|librarians|weavers|pilots|brewers|"
    "magistrates|physicians|carpenters|musicians|watchmakers|foresters|cartographers|millers|shepherds"
)
VERBS: Final = _words(
    "reviewed|measured|catalogued|compared|rebuilt|published|interviewed|tested|mapped|ordered|translated|repaired|"
    "sampled|reopened|counted|drafted|preserved|questioned|exchanged|painted|registered|inherited|described|sorted|"
    "financed|protected|collected|examined|doubled|abandoned|recovered|displayed"
)
OBJECTS: Final = _words(
    "tide tables|ledgers|glass plates|bridges|reports|tenancies|alloys|quarries|seedlings|letters|"
    "signal lamps|springs|reading rooms|geese|budgets|orchards|barometers|tunnels|manuscripts|looms|"
    "sluices|telescopes|recipes|harvests|contracts|lanterns|pumps|coins|anchors|herbariums|turbines|maps|violins|warehouses|"
    "hedges|engravings"
)
LINKS: Final = _words(
    "and|while|because|although|so that|until|even though|whereas|and soon|just as|since|after which|once|"
    "and by then|as if|before"
)
STARTS: Final = _words("Vel|Tarn|Os|Bre|Kel|Mor|Ash|Dun|Fen|Hal|Lor|Quil|Ren|Sel|Thar|Wes")
MIDDLES: Final = _words("a|e|i|o|an|en|in|on|ar|er|ir|or|al|el|il|ol")
ENDS: Final = _words("mora|wick|ford|haven|dale|ton|bury|mere|gate|stead|brook|field|cliff|moor|port|shaw")
