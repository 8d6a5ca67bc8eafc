"""Pages hold everything themselves and escape what they are given."""

from tinyllama_jax.report import page


def test_a_page_escapes_text_and_holds_its_pictures(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'\x89PNG')
    parts = [
        page.heading('<run>', 1),
        page.note('a & b'),
        page.table([('x', '<y>')]),
        page.picture('P', tmp_path / 'a.png'),
    ]
    found = page.page('<title>', parts)
    assert found.startswith('<!doctype html>') and found.endswith('</html>\n')
    assert '<title>&lt;title&gt;</title>' in found and '<h1>&lt;run&gt;</h1>' in found
    assert '<p class="note">a &amp; b</p>' in found
    assert '<tr><th>x</th><td>&lt;y&gt;</td></tr>' in found
    assert '<img alt="P" src="data:image/png;base64,iVBORw==">' in found
