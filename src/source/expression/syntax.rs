//! The text of an expression: parsing it, and refusing what it may not say, each with its place.

use std::collections::BTreeSet;
use std::ops::{ControlFlow, Range};

use datafusion_expr::Volatility;
use datafusion_sql::sqlparser::ast::{self, Spanned, Visit, Visitor};
use datafusion_sql::sqlparser::dialect::GenericDialect;
use datafusion_sql::sqlparser::parser::{Parser, ParserError};
use datafusion_sql::sqlparser::tokenizer::{Location, Span, Token, Tokenizer};

use super::ExpressionError;
use super::catalog::CATALOG;
use crate::config::names;
use crate::config::plan::Column;

/// Most words, operators and brackets in an expression: every stage of planning recurses into it, on a thread's stack.
const MAX_TOKENS: usize = 512;

/// Parses one expression and nothing after it.
pub(super) fn parse(sql: &str) -> Result<ast::Expr, ExpressionError> {
    let fail = |message: String, span: Range<usize>| ExpressionError { message, help: None, span: widen(sql, span) };
    if sql.trim().is_empty() {
        return Err(fail("the expression is empty".into(), 0..sql.len()));
    }
    let parser_error = |error: ParserError| match error {
        ParserError::TokenizerError(text) | ParserError::ParserError(text) => {
            let (message, at) = split_location(&text);
            let start = at.map_or(sql.len(), |at| byte_offset(sql, at));
            fail(first_lower(message), start..start)
        }
        ParserError::RecursionLimitExceeded => fail("the expression is nested too deeply".into(), 0..sql.len()),
    };
    let dialect = GenericDialect {};
    let tokens = Tokenizer::new(&dialect, sql)
        .tokenize_with_location()
        .map_err(|error| parser_error(ParserError::TokenizerError(error.to_string())))?;
    if tokens.iter().filter(|t| !matches!(t.token, Token::Whitespace(_))).count() > MAX_TOKENS {
        return Err(ExpressionError {
            message: format!("the expression has more than {MAX_TOKENS} words and operators"),
            help: Some("split it into several derived columns".into()),
            span: 0..sql.len(),
        });
    }
    let mut parser = Parser::new(&dialect).with_tokens_with_locations(tokens);
    let expr = parser.parse_expr().map_err(parser_error)?;
    let rest = parser.peek_token();
    match rest.token {
        Token::EOF => Ok(expr),
        token => Err(fail(format!("unexpected `{token}` after the end of the expression"), byte_span(sql, rest.span))),
    }
}

/// Splits the position off a parser message: `Expected: an expression, found: ) at Line: 1, Column: 5`.
fn split_location(text: &str) -> (&str, Option<Location>) {
    let split = || {
        let (message, place) = text.rsplit_once(" at Line: ")?;
        let (line, column) = place.split_once(", Column: ")?;
        Some((message, Location::new(line.trim().parse().ok()?, column.trim().parse().ok()?)))
    };
    split().map_or((text, None), |(message, at)| (message, Some(at)))
}

/// The text with its first letter in lower case, as messages begin.
pub(super) fn first_lower(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

/// Byte offset of a position that counts lines and characters from 1.
fn byte_offset(sql: &str, at: Location) -> usize {
    let mut start = 0;
    for _ in 1..at.line {
        match sql[start..].find('\n') {
            Some(end) => start += end + 1,
            None => return sql.len(),
        }
    }
    let column = usize::try_from(at.column.saturating_sub(1)).unwrap_or(usize::MAX);
    sql[start..].char_indices().nth(column).map_or(sql.len(), |(offset, _)| start + offset)
}

/// Bytes that a parser's span covers; the whole text where the parser does not know.
pub(super) fn byte_span(sql: &str, span: Span) -> Range<usize> {
    if span == Span::empty() {
        return 0..sql.len();
    }
    let start = byte_offset(sql, span.start);
    widen(sql, start..byte_offset(sql, span.end).max(start))
}

/// Makes an empty span one character long, so that it can be pointed at.
fn widen(sql: &str, span: Range<usize>) -> Range<usize> {
    if !span.is_empty() || sql.is_empty() {
        return span;
    }
    match sql[span.start..].chars().next() {
        Some(c) => span.start..span.start + c.len_utf8(),
        None => sql.char_indices().next_back().map_or(span.clone(), |(last, _)| last..sql.len()),
    }
}

/// Finds what is refused, unknown columns (where the columns are known) and unknown functions; returns the columns used.
pub(super) fn check(
    sql: &str,
    expr: &ast::Expr,
    input: Option<&[Column]>,
) -> Result<BTreeSet<String>, Vec<ExpressionError>> {
    let mut checker = Checker { sql, input, used: BTreeSet::new(), errors: Vec::new() };
    let _ = expr.visit(&mut checker);
    if checker.errors.is_empty() { Ok(checker.used) } else { Err(checker.errors) }
}

struct Checker<'a> {
    sql: &'a str,
    input: Option<&'a [Column]>,
    used: BTreeSet<String>,
    errors: Vec<ExpressionError>,
}

impl Checker<'_> {
    fn refuse(&mut self, span: Span, message: impl Into<String>, help: Option<String>) {
        let span = byte_span(self.sql, span);
        self.errors.push(ExpressionError { message: message.into(), help, span });
    }

    fn column(&mut self, ident: &ast::Ident) {
        if let Some(input) = self.input
            && !input.iter().any(|c| *c.name == *ident.value)
        {
            let help = names::suggestion(&ident.value, "columns here", input.iter().map(|c| &*c.name));
            let message = if ident.quote_style == Some('"') && !names::is_identifier(&ident.value) {
                format!("unknown column `{}`; a text is written in single quotes", ident.value)
            } else {
                format!("unknown column `{}`", ident.value)
            };
            self.refuse(ident.span, message, help);
        }
        self.used.insert(ident.value.clone());
    }

    fn function(&mut self, function: &ast::Function) {
        let span = function.name.span();
        let name = function.name.to_string().to_lowercase();
        if function.over.is_some() || CATALOG.windows.contains(&name) {
            let help = "aggregate over time with a feature group: its functions and windows";
            return self.refuse(
                span,
                format!("`{name}` is a window function: an expression sees one row"),
                Some(help.into()),
            );
        }
        match CATALOG.functions.get(&name) {
            Some(udf) if udf.signature().volatility != Volatility::Immutable => self.refuse(
                span,
                format!("`{name}` gives another value each time: features must be deterministic"),
                Some("use the event's own fields; the event time is the instant that a row is as of".into()),
            ),
            Some(_) => {}
            None if CATALOG.aggregates.contains(&name) => {
                let help = "aggregate with a feature group: its functions and windows";
                self.refuse(span, format!("`{name}` is an aggregate: an expression sees one row"), Some(help.into()));
            }
            None => {
                let known = CATALOG.functions.keys().map(String::as_str);
                let help = names::nearest(&name, known).map(|near| format!("did you mean `{near}`?"));
                self.refuse(span, format!("unknown function `{name}`"), help);
            }
        }
    }
}

impl Visitor for Checker<'_> {
    type Break = ();

    fn pre_visit_query(&mut self, query: &ast::Query) -> ControlFlow<()> {
        self.refuse(query.span(), "a subquery is not allowed: an expression sees one row", None);
        ControlFlow::Break(())
    }

    fn pre_visit_expr(&mut self, expr: &ast::Expr) -> ControlFlow<()> {
        match expr {
            ast::Expr::Identifier(ident) => self.column(ident),
            ast::Expr::CompoundIdentifier(parts) => {
                let help = parts.last().map(|last| format!("write `{}`, or quote a name that has a dot", last.value));
                self.refuse(expr.span(), format!("`{expr}` names a table, and there are none here"), help);
            }
            ast::Expr::Function(function) => self.function(function),
            ast::Expr::Wildcard(_) | ast::Expr::QualifiedWildcard(..) => {
                self.refuse(expr.span(), "`*` is not allowed: name the columns", None);
            }
            ast::Expr::Value(ast::ValueWithSpan { value: ast::Value::Placeholder(name), span }) => {
                self.refuse(*span, format!("placeholder `{name}` has no value here"), None);
            }
            _ => {}
        }
        ControlFlow::Continue(())
    }
}
