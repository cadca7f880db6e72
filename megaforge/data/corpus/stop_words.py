"""The commonest words of some languages: what running text is full of and lists, menus and keyword spam lack."""

from __future__ import annotations

import functools

import numpy as np
import pyarrow as pa

from megaforge.data.corpus.words import HashSet, plain_words

STOP_WORDS = {
    "en": "the of and to in a is that for it as was with be by on not he this are or his from at which but "
    "have an had they you were their one all we can her has there been if more when will would who so "
    "no your its",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden "
    "aus er hat dass sie nach wird bei einer um am sind noch wie einem über so zum war haben nur oder "
    "aber",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont avec "
    "son sa ou comme mais je nous vous on leur cette être aux elle",
    "es": "de la que el en y a los se del las un por con no una su para es al lo como más o pero sus le ha me "
    "si sin sobre este ya entre cuando todo esta ser son",
    "it": "di e il la che in a per un del è con non una i le da si al dei come più ma alla nel della lo gli "
    "sono anche ha se o su ci questo delle dal",
    "pt": "de a o que e do da em um para com não uma os no se na por mais as dos como mas ao ele das à seu "
    "sua ou quando muito nos já eu também só pelo pela até isso é",
    "nl": "de van het een en in is dat op te zijn met voor niet aan er om ook als dan maar bij of uit nog "
    "naar die door over hij ze wordt heeft worden tot was deze kan",
    "sv": "och i att det som en på är av för med till den har de inte om ett han men var jag sig från vi så "
    "kan man när år säger hon under också efter eller nu",
    "da": "og i at det er en til af på for den med de som der ikke et har fra han var om jeg vi men kan sig "
    "så efter også eller blev hun ved",
    "no": "og i det er på en som til for av at de med den har ikke om et fra men var han seg vi så kan etter "
    "også eller ble hun ved å",
    "fi": "ja on ei se että hän oli ovat mutta kun niin myös joka tai kuin olla sen ole vain nyt sitä mitä jos sekä",
    "pl": "w i na się z do nie to że jest o od jak za po a ale przez dla są co jego czy tym oraz już ich "
    "tylko może przy",
    "cs": "a v se na je že s z do o i to k ve pro za by ale si po jako podle od tak jsou které který jeho nebo už jen",
    "ru": "и в не на я что с он как это по но из у за к от а то так же о все его для мы бы было был она они или при",
    "uk": "і в на не з що у до та як це за про є він від по але для а вони його або так ми був які",
    "tr": "ve bir bu da de için ile çok ne o gibi daha olarak ama en kadar sonra var ki olan her mi ya değil",
    "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga ke karena ada mereka sudah saya atau oleh",
    "vi": "và của là có trong cho không được các một với người những đã này để khi về từ cũng như ra",
}


@functools.cache
def stop_word_masks() -> tuple[HashSet, np.ndarray, dict[str, int]]:
    """The hashes of all stop words; the languages of each as bits [words] uint64; and the bit of
    each language."""
    bits = {code: 1 << number for number, code in enumerate(STOP_WORDS)}
    masks: dict[int, int] = {}
    for code, text in STOP_WORDS.items():
        for one in plain_words(pa.array([text], pa.large_string())).hash.tolist():
            masks[one] = masks.get(one, 0) | bits[code]
    hashes = np.array(sorted(masks), np.uint64)
    return HashSet(hashes), np.array([masks[one] for one in hashes.tolist()], np.uint64), bits
