//! The demo's table: one row per way to connect the topology.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets::UTF8_FULL_CONDENSED};

/// One row, as text.
#[derive(Clone, Debug)]
pub struct Row {
    /// The cells, in the order of the columns.
    pub cells: Vec<String>,
}

/// Renders rows below their column titles. All columns but the first are numbers, so they are aligned to the right.
pub fn render(titles: &[&str], rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(titles.iter().copied());
    for row in rows {
        table.add_row(&row.cells);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_aligned_to_the_right() {
        let rows = ["9", "1234"].map(|number| Row { cells: vec!["tc".to_owned(), number.to_owned()] });
        let text = render(&["rung", "kpps"], &rows);
        assert!(text.contains("    9 │") && text.contains(" 1234 │"), "{text}");
    }
}
