"""A page embeds its pictures and escapes text."""

from tinyllama_jax.report import page


def test_a_page_escapes_text_and_holds_its_pictures(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'\x89PNG')
    parts = [
        page.heading('<run>', 1),
        page.note('a & b'),
        page.table([('x', '<y>')]),
        page.picture('P', tmp_path / 'a.png'),
    ]
    text = page.page('<title>', parts)
    assert text.startswith('<!doctype html>') and text.endswith('</html>\n')
    assert '<title>&lt;title&gt;</title>' in text and '<h1>&lt;run&gt;</h1>' in text
    assert '<p class="note">a &amp; b</p>' in text
    assert '<tr><th>x</th><td>&lt;y&gt;</td></tr>' in text
    assert '<img alt="P" src="data:image/png;base64,iVBORw==">' in text
